"""Where does the gradient of the demo come from, before training?

Of what two methods keep in one batch of 48 responses: the word "gets" and all other tokens,
with the mean loss, the mean norm of the gradient on the logits, and the norm of their
part of the gradient on the student's weights. From the project's folder:

    python .evidence/gradients.py
"""

import sys

import torch

sys.path.insert(0, ".")
import opd


def norm(tensors):
    return torch.sqrt(sum(tensor.square().sum() for tensor in tensors)).item()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair = opd.load_pair("runs/pair/student", "runs/pair/teacher")
    examples = opd.read_prompts("runs/pair/prompts.jsonl", pair, max_new_tokens=64)
    prompts = [example["prompt"] for example in examples[:48]]
    gets = pair.tokenizer.convert_tokens_to_ids("Ġgets")
    obtains = pair.tokenizer.convert_tokens_to_ids("Ġobtains")

    batch = opd.rollout(pair, prompts, max_new_tokens=64)
    scores, teacher_hidden = opd.score(pair, batch, k=16, micro_batch_size=48)
    student_hidden = opd.hidden_states(pair.student, batch)
    for method in ("divergence", "teachability"):
        ranks = opd.rank(method, scores, batch.mask)
        keep = opd.select(ranks, batch.mask, 0.1)
        p = opd.next_token_logits(pair, pair.student, student_hidden[keep])
        q = opd.next_token_logits(pair, pair.teacher, teacher_hidden[keep]).detach()
        losses = opd.reverse_kl(p, q)
        (on_logits,) = torch.autograd.grad(losses.sum(), p, retain_graph=True)

        is_gets = batch.responses[keep] == gets
        texts = [pair.tokenizer.decode(token) for token in batch.responses[keep]]
        are_hours = torch.tensor([text.strip().isdigit() for text in texts])
        for name, these in (("gets", is_gets), ("others", ~is_gets)):
            on_weights = torch.autograd.grad(
                losses[these].sum() / len(losses),
                list(pair.student.parameters()),
                retain_graph=True,
            )
            print(
                f"{method}, {name}: {these.float().mean():.0%} of what is kept, "
                f"loss {losses[these].mean():.2f}, gradient on the logits "
                f"{on_logits[these].norm(dim=-1).mean():.4f}, on the weights "
                f"{norm(on_weights):.3f}; {are_hours[these].float().mean():.0%} are hours"
            )
        print(
            f"   p(gets) {p[is_gets].softmax(-1)[:, gets].mean():.4f}, "
            f"p(obtains) {p[is_gets].softmax(-1)[:, obtains].mean():.1e}, "
            f"q(obtains) {q[is_gets].softmax(-1)[:, obtains].mean():.2f}, "
            f"highest rank {ranks[keep][is_gets].max():.4f}"
        )


if __name__ == "__main__":
    main()
