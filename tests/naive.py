"""The naive reference: what most training loops do. Every optimisation of elm is held against it.

Rows padded to the longest, an attention mask, all logits of all positions, checkpointing on, the
model's own attention. Only the normalisation is not naive: summed loss over the step's labels.
"""

import torch
import torch.nn.functional as F

import elm


def token_rows(split, row_ids):
    """[(ids with -1 for soft tokens, number of response tokens, vector)] of the split's rows."""
    rows = []
    for i, example in zip(row_ids, split.examples(row_ids), strict=True):
        vector = split.vectors[int(split.index["vector_id"][i])]
        rows.append((torch.from_numpy(example.ids), example.num_labels, vector))
    return rows


def naive_batch(examples):
    """(ids, mask, labels), each [n, longest]; labels are -100 but at the response."""
    lengths = [len(ids) for ids, _, _ in examples]
    batch = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(batch)
    labels = torch.full_like(batch, -100)
    for i, (ids, num_labels, _) in enumerate(examples):
        batch[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        response = slice(len(ids) - num_labels, len(ids))
        labels[i, response] = ids[response]
    return batch, mask, labels


def naive_embeds(llm, adapter, examples):
    """[n, longest, D] in the LLM's dtype, the adapter's outputs where the soft tokens are."""
    ids = naive_batch(examples)[0].to(llm.device)
    vectors = torch.stack([vector for _, _, vector in examples])
    soft_tokens = adapter(vectors.float().to(llm.device))
    embeds = llm.get_input_embeddings()(ids.clamp(min=0))
    return embeds.masked_scatter((ids == -1)[..., None], soft_tokens.to(embeds.dtype))


def naive_loss(llm, adapter, examples):
    """Summed cross-entropy over all response tokens of `examples`, as a scalar with its graph."""
    _, mask, labels = (x.to(llm.device) for x in naive_batch(examples))
    embeds = naive_embeds(llm, adapter, examples)
    logits = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    shifted = logits[:, :-1].flatten(0, 1).float()
    target = labels[:, 1:].flatten()
    return F.cross_entropy(shifted, target, ignore_index=-100, reduction="sum")


def naive_cosine(llm, adapter, examples, probe):
    """[n]: of the LLM's mean hidden state over a response, by the probe, and the embedding."""
    _, mask, labels = (x.to(llm.device) for x in naive_batch(examples))
    embeds = naive_embeds(llm, adapter, examples)
    hidden = llm.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    is_response = (labels != -100)[..., None]
    means = (hidden * is_response).sum(1) / is_response.sum(1)
    vectors = torch.stack([vector for _, _, vector in examples]).float().to(llm.device)
    standardized = (vectors - adapter.mean) / adapter.std
    projected = (means - probe.hidden_mean) @ probe.matrix
    return F.cosine_similarity(projected, standardized - probe.embedding_mean)


def naive_step(llm, adapter, batches):
    """(mean loss, flat adapter gradient) of lists of examples, with activation checkpointing."""
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter.zero_grad()
    num_labels = sum(n for batch in batches for _, n, _ in batch)
    total = 0.0
    for batch in batches:
        loss = naive_loss(llm, adapter, batch) / num_labels
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in adapter.parameters()])


def elm_step(model, split, row_ids, budget):
    """(mean loss, flat adapter gradient, number of micro-batches) of a step of elm's loop."""
    model.adapter.zero_grad()
    step = elm.prepare_step(split, budget, elm.RowsOfStep(0, len(row_ids), row_ids))
    soft_tokens = model(torch.cat([batch.embeddings for batch in step.batches]))
    sums, gradient = elm.soft_gradient(model, soft_tokens, step, elm.LossConfig(), None)
    soft_tokens.backward(gradient)
    gradient = torch.cat([p.grad.flatten() for p in model.adapter.parameters()])
    return sums.nll.item() / step.num_labels, gradient, len(step.batches)


def naive_ridge(x, y, heldout):
    """(RidgeFit, its ridge): of all ridges the one that is best on the rows held out."""
    x_mean = x[~heldout].mean(0)
    y_mean = y[~heldout].mean(0)
    a = x[~heldout] - x_mean
    b = y[~heldout] - y_mean
    gram = a.T @ a
    identity = torch.eye(len(gram), dtype=gram.dtype)
    errors = []
    fits = []
    for ridge in elm.RIDGES:
        penalty = ridge * gram.trace() / len(gram) * identity
        weights = torch.linalg.inv(gram + penalty) @ a.T @ b
        error = (x[heldout] - x_mean) @ weights + y_mean - y[heldout]
        errors.append(error.square().sum().item())
        fits.append(elm.RidgeFit(weights, x_mean, y_mean))
    best = errors.index(min(errors))
    return fits[best], elm.RIDGES[best]
