"""The naive reference: what most training loops do. Every optimisation of elm is held against it.

Rows padded to the longest, an attention mask, all logits of all positions, checkpointing on, the
model's own attention. Only the normalisation is not naive: summed loss over the step's labels.
"""

import torch
import torch.nn.functional as F

import elm


def token_rows(split, rows):
    """[(ids with -1 for soft tokens, number of response tokens, vector)] of the split's rows."""
    return [(torch.from_numpy(e.ids), e.num_labels, split.vectors[int(split.index["vector_id"][i])])
            for i, e in zip(rows, split.examples(rows), strict=True)]


def naive_batch(examples):
    """(ids, mask, labels), each [n, longest]; labels are -100 but at the response."""
    width = max(len(ids) for ids, _, _ in examples)
    batch = torch.stack([F.pad(ids, (0, width - len(ids)), value=0) for ids, _, _ in examples])
    mask = torch.stack([F.pad(torch.ones(len(i)), (0, width - len(i))) for i, _, _ in examples])
    labels = torch.full_like(batch, -100)
    for row, (ids, response, _) in zip(labels, examples, strict=True):
        row[len(ids) - response : len(ids)] = ids[len(ids) - response :]
    return batch, mask.long(), labels


def naive_loss(llm, adapter, examples):
    """Summed cross-entropy over all response tokens of `examples`, as a scalar with its graph."""
    batch, mask, labels = (x.to(llm.device) for x in naive_batch(examples))
    soft = adapter(torch.stack([v for _, _, v in examples]).float().to(llm.device))
    embeds = llm.get_input_embeddings()(batch.clamp(min=0))
    embeds = embeds.masked_scatter((batch == -1)[..., None], soft.to(embeds.dtype))
    logits = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    shifted, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(shifted, target, ignore_index=-100, reduction="sum")


def naive_step(llm, adapter, batches):
    """(mean loss, flat adapter gradient) of lists of examples, with activation checkpointing."""
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter.zero_grad()
    labels, total = sum(response for batch in batches for _, response, _ in batch), 0.0
    for batch in batches:
        loss = naive_loss(llm, adapter, batch) / labels
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in adapter.parameters()])


def elm_step(model, split, rows, budget):
    """(mean loss, flat adapter gradient, number of micro-batches) of a step of elm's loop."""
    model.adapter.zero_grad()
    step = elm.prepare_step(split, budget, elm.RowsOfStep(0, len(rows), rows))
    soft_tokens = model(torch.cat([batch.embeddings for batch in step.batches]))
    sums, gradient = elm.soft_gradient(model, soft_tokens, step, elm.LossConfig(), None)
    soft_tokens.backward(gradient / step.num_labels)
    gradient = torch.cat([p.grad.flatten() for p in model.adapter.parameters()])
    return sums.nll.item() / step.num_labels, gradient, len(step.batches)


def naive_ridge(x, y, held):
    """(weights, mean of x, mean of y, the ridge that is best on the rows `held`)."""
    center, mean = x[~held].mean(0), y[~held].mean(0)
    gram, found = (x[~held] - center).T @ (x[~held] - center), []
    for value in elm.RIDGES:
        loaded = gram + value * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.inv(loaded) @ (x[~held] - center).T @ (y[~held] - mean)
        error = ((x[held] - center) @ weights - y[held] + mean).square().sum().item()
        found.append((error, weights, center, mean, value))
    return min(found, key=lambda f: f[0])[1:]
