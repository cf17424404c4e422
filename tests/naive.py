"""The naive reference: what most training loops do. Every optimisation of elm is held against it.

Rows padded to the longest, an attention mask, all logits of all positions, checkpointing on, the
model's own attention. Only the normalisation is not naive: summed loss over the step's labels.
"""

import torch
import torch.nn.functional as F


def token_rows(split, rows, soft: int):
    """[(ids with -1 for soft tokens, number of response tokens, vector)] of the split's rows."""
    out = []
    for i in rows:
        row = split.rows[i]
        start, length = row["start"][0], row["length"][0]
        ids = split.ids[start : start + length].astype("int64")
        ids[row["slot"] : row["slot"] + soft] = -1
        out.append((torch.from_numpy(ids), int(row["response"]), split.vectors[int(row["vector"])]))
    return out


def naive_loss(llm, adapter, examples):
    """Mean cross-entropy over all response tokens of `examples`, as a scalar with its graph."""
    width = max(len(ids) for ids, _, _ in examples)
    batch = torch.stack([F.pad(ids, (0, width - len(ids)), value=0) for ids, _, _ in examples])
    mask = torch.stack([F.pad(torch.ones(len(i)), (0, width - len(i))) for i, _, _ in examples])
    labels = torch.full_like(batch, -100)
    for row, (ids, response, _) in zip(labels, examples, strict=True):
        row[len(ids) - response : len(ids)] = ids[len(ids) - response :]
    soft = adapter(torch.stack([v for _, _, v in examples]).float())
    embeds = llm.get_input_embeddings()(batch.clamp(min=0))
    embeds = embeds.masked_scatter((batch == -1)[..., None], soft.to(embeds.dtype))
    logits = llm(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits
    shifted, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return (
        F.cross_entropy(shifted, target, ignore_index=-100, reduction="sum") / (target >= 0).sum()
    )


def naive_step(llm, adapter, examples):
    """(loss, flat adapter gradient) with activation checkpointing on."""
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter.zero_grad()
    loss = naive_loss(llm, adapter, examples)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in adapter.parameters()])
