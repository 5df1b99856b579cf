"""Do the whole job in one plain PyTorch loop, written from the definitions: eager attention maps, whole tensors.

Nothing of dsdistill's operators, terms, objective, capture or engine is used here.
"""

import math

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, get_scheduler


def pairwise_cosine(hidden, mask):
    """Return the mean over sequences of Σ_ij (R_S − R_T)² / n²."""
    total = 0.0
    for student, teacher, valid in zip(*hidden, mask, strict=True):
        relations = [F.normalize(x[valid], dim=-1) for x in (student, teacher)]
        difference = relations[0] @ relations[0].T - relations[1] @ relations[1].T
        total = total + difference.square().mean()
    return total / len(mask)


def plain_loss(student_out, teacher_out, batch, projectors, temperature=2.0):
    """Compute every term by its definition, over one whole batch."""
    mask, rows = batch.mask, batch.mask.sum()
    task = F.cross_entropy(student_out.logits, batch.labels)
    p = F.softmax(teacher_out.logits / temperature, -1)
    log_q = F.log_softmax(student_out.logits / temperature, -1)
    soft = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    pairs = [(0, 0), (1, 2), (2, 4)]
    hidden = 0.0
    for (s, t), weight in zip(pairs, projectors, strict=True):
        difference = student_out.hidden_states[s] @ weight.T - teacher_out.hidden_states[t]
        hidden = hidden + difference[mask].square().mean() / len(pairs)
    attention = pairwise = 0.0
    for s, t in pairs[1:]:
        a_s, a_t = student_out.attentions[s - 1], teacher_out.attentions[t - 1]
        keys = mask[:, None, None, :]
        ratio = (a_t.clamp_min(1e-38).log() - a_s.clamp_min(1e-38).log()).masked_fill(~keys, 0.0)
        kl = (a_t * ratio).sum(-1).transpose(1, 2)[mask]  # (rows, H)
        attention = attention + kl.sum() / (rows * kl.shape[1]) / 2
        states = (student_out.hidden_states[s], teacher_out.hidden_states[t])
        pairwise = pairwise + pairwise_cosine(states, mask) / 2
    return {"task": task, "soft_label": soft, "hidden": hidden, "attention": attention, "pairwise": pairwise}


def plain_run(
    settings: dict, projectors: list[torch.Tensor], batches: list, adapted=lambda student: student
) -> list[dict[str, float]]:
    """Losses of every step, term by term, of AdamW over the given whole batches.

    adapted: puts adapters into the student.
    """

    def model(section):
        found = AutoModelForSequenceClassification.from_pretrained(
            section["path"], attn_implementation="eager"
        )
        return found.float()

    teacher, student = model(settings["teacher"]).eval(), adapted(model(settings["student"])).train()
    projectors = [torch.nn.Parameter(weight.clone()) for weight in projectors]
    trained = [*(p for p in student.parameters() if p.requires_grad), *projectors]
    train = settings["train"]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train["learning_rate"])
    warmup = math.floor(0.1 * len(batches))
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=len(batches))
    history = []
    for batch in batches:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.mask.long(),
            "token_type_ids": batch.token_types,
            "output_hidden_states": True,
            "output_attentions": True,
        }
        with torch.no_grad():
            teacher_out = teacher(**inputs)
        terms = plain_loss(student(**inputs), teacher_out, batch, projectors)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        history.append({name: value.item() for name, value in terms.items()})
    return history
