"""Token-selective on-policy distillation (OPD) in one file.

A student language model writes its own responses, a frozen teacher scores every token of them, and
the student moves towards the teacher at the few positions where it can learn from it ("Not All
Disagreement Is Learnable", arXiv 2605.26844). One training step:

  1. rollout  the student samples a response to each prompt                  rollout, response_mask
  2. score    at each response position: the student's entropy H, its disagreement D with the
              teacher, and C, the teacher's probability mass on the student's own candidates
                                              backbone, measure, entropy, divergence, compatibility
  3. select   D splits into D*C (learnable) and D*(1-C) (incompatible); the best `budget` share of
              the batch's positions is kept    robust_normalize, position_scores, select_positions
  4. update   one optimizer step on the mean reverse KL(student || teacher) of the kept positions
                                                                             token_loss, backward

p is the student's and q the teacher's next-token distribution. B responses, P prompt tokens, R
response positions, V vocabulary, N valid positions, E hidden width. KLs and entropies are in nats.
"Top-k" here is only `top_k`, the K of D and C; the share of positions kept is `budget`, and a top-k
sampling filter does not exist. Left out on purpose: several GPUs, LoRA, inference servers,
activation checkpointing.
"""
import argparse, json, math, shutil, sys, time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

METHODS = ("full", "teachability", "teachability_entropy", "entropy", "divergence", "tip",
           "compatibility", "incompatible", "random")
CHUNK = 2**22  # logits of one model that exist at once: 16 MiB of float32, whatever the batch
BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
autocast = torch.autocast("cuda", torch.bfloat16, enabled=BF16)  # matrix products, on a GPU

# ---- The mathematics: pure functions of logits in any float dtype. Copy them freely.

def entropy(logits):  # [..., V] -> [...]
    """H = -sum_v p(v) log p(v), in nats, over the full vocabulary."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)

def forward_kl(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """Forward KL(teacher || student) = sum_v q(v) (log q(v) - log p(v)), in nats. Mode covering."""
    logp, logq = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)

def reverse_kl(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """Reverse KL(student || teacher) = sum_v p(v) (log p(v) - log q(v)), in nats. Mode seeking."""
    logp, logq = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)

def divergence(student_logits, teacher_logits, k):  # [..., V], [..., V] -> [...]
    """D = KL(q|U || p|U) in nats: U is the union of both top-K sets, p and q renormalised on it."""
    k = min(k, student_logits.shape[-1])
    mine, theirs = student_logits.topk(k).indices, teacher_logits.topk(k).indices  # [..., K] each
    shared = (theirs[..., :, None] == mine[..., None, :]).any(-1)  # in both sets: counts once
    union = torch.cat([mine, theirs], -1)  # [..., 2K]
    twice = torch.cat([torch.zeros_like(shared), shared], -1)
    # A softmax over the logits of U renormalises on U. -1e30, not -inf: 0 * inf would be nan.
    logp = student_logits.gather(-1, union).float().masked_fill(twice, -1e30).log_softmax(-1)
    logq = teacher_logits.gather(-1, union).float().masked_fill(twice, -1e30).log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)

def compatibility(student_logits, teacher_logits, k):  # [..., V], [..., V] -> [...]
    """C = the teacher's probability mass on the student's top-K tokens, in [0, 1]."""
    mine = student_logits.topk(min(k, student_logits.shape[-1])).indices  # [..., K]
    return teacher_logits.float().log_softmax(-1).gather(-1, mine).exp().sum(-1)

def robust_normalize(values, mask):  # [B, R], [B, R] bool -> [B, R] in [0, 1]
    """clip((z - Q05) / (Q95 - Q05), 0, 1) over valid positions; zeros where Q95 - Q05 < 1e-12."""
    valid = values[mask].float().cpu().numpy()  # numpy: torch.quantile refuses over 16 million
    low, high = numpy.quantile(valid, [0.05, 0.95]) if len(valid) else (0, 0)
    if high - low < 1e-12:
        return torch.zeros_like(values, dtype=torch.float32)
    return torch.where(mask, ((values.float() - low) / (high - low)).clamp(0, 1), 0.0)

def position_scores(method, entropy, divergence, compatibility, mask, generator=None):
    """[B, R] each -> [B, R]: the score by which `method` ranks positions, from the raw H, D and C.
    `random` draws from `generator` (on the CPU). Raises ValueError for an unknown method."""
    if method == "random":
        return torch.rand(mask.shape, generator=generator).to(mask.device)
    h, d, c = (robust_normalize(z, mask) for z in (entropy, divergence, compatibility))
    learnable, incompatible = d * c, d * (1 - c)  # they add up to d
    scores = {"full": torch.zeros_like(d),  # no ranking: every position is kept
              "teachability": learnable,
              "teachability_entropy": h + learnable - h * learnable,  # soft OR
              "entropy": h,
              "divergence": d,
              "tip": h + d - h * d,
              "compatibility": c,
              "incompatible": incompatible}
    if method not in scores:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    return scores[method]

def select_positions(scores, mask, budget):  # [B, R], [B, R] bool -> [B, R] bool
    """The ceil(budget * N) best positions of the batch, then the best of any response without one.
    Ties go to the earlier position, row by row. Raises ValueError for a budget outside (0, 1]."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}")
    valid = mask.flatten().nonzero().squeeze(-1)  # [N]
    number = math.ceil(round(budget * len(valid), 6))  # rounded: 0.07 * 100 is 7.000000000000001
    best = scores.flatten()[valid].sort(descending=True, stable=True).indices[:max(number, 1)]
    keep = torch.zeros_like(mask).flatten().index_fill(0, valid[best], True).view_as(mask)
    bare = mask.any(-1) & ~keep.any(-1)
    keep[bare, scores.float().masked_fill(~mask, -math.inf).argmax(-1)[bare]] = True
    return keep

def response_mask(responses, eos_ids):  # [B, R] ids -> [B, R] bool
    """True up to and including the first EOS. Not "where not pad": pad is often EOS as well, and
    then the student would never be taught to stop."""
    ends = torch.tensor(list(eos_ids), dtype=responses.dtype, device=responses.device)
    is_end = torch.isin(responses, ends)
    return is_end.cumsum(-1) - is_end.long() == 0

def token_loss(kind, student_logits, teacher_logits, tokens):  # [..., V] twice, [...] -> [...]
    """`reverse_kl`, `forward_kl`, or `sampled`: -A log p(y), A = log q(y) - log p(y) held constant.
    Over y ~ p, the expected gradient of `sampled` is that of `reverse_kl`. In nats."""
    if kind != "sampled":
        return {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[kind](student_logits,
                                                                          teacher_logits)
    logp, logq = (logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
                  for logits in (student_logits, teacher_logits))
    return -(logq - logp).detach() * logp

# ---- Two models with one vocabulary, and prompts for them.

class Pair(NamedTuple):
    student: torch.nn.Module  # float32 weights: in bf16 an update of 1e-6 rounds to nothing
    teacher: torch.nn.Module  # frozen; bf16 on a GPU
    tokenizer: transformers.PreTrainedTokenizerBase
    eos_ids: list  # whatever ends a response for either model
    pad_id: int
    width: int  # V, the ids that both models predict
    temperature: float  # one for sampling, scoring and loss

def fail(message, status=2):
    """Stop the program with one clear line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)

def load_model(flag, path, dtype, device):  # -> model, tokenizer, EOS ids
    try:  # weights from safetensors only, and no code from the model's repository
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"{flag} {path} cannot be loaded: {' '.join(str(error).split())}")
    model.to(device).eval()  # for good: with dropout, the update would not see what was sampled
    ids = torch.arange(3, device=device)[None]
    with torch.no_grad():
        if not model.get_output_embeddings()(model.base_model(ids)[0]).equal(model(ids).logits):
            fail(f"{flag} {path}: {model.config.model_type} models soft-cap or scale their logits, "
                 "which opd.py, projecting single positions by itself, would miss")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return model, tokenizer, ends

def load_pair(student_path, teacher_path, temperature=1.0, device="cpu"):
    """Load both models and check that they can be compared token by token."""
    half = torch.bfloat16 if BF16 and torch.device(device).type == "cuda" else torch.float32
    student, tokenizer, ends = load_model("--student", student_path, torch.float32, device)
    teacher, other, teacher_ends = load_model("--teacher", teacher_path, half, device)
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = min(t for t in mine | theirs if mine.get(t) != theirs.get(t))
        fail(f"the tokenizers differ: {token!r} has id {mine.get(token)} for the student and "
             f"{theirs.get(token)} for the teacher; choose two models with one vocabulary")
    eos_ids = sorted(ends | teacher_ends)  # a base student may stop the way its chat teacher does
    pad_id = next(i for i in (tokenizer.pad_token_id, *eos_ids, 0) if i is not None)
    # A checkpoint's own sampling habits (top_k=20, repetition_penalty) must not bend the rollouts.
    student.generation_config = transformers.GenerationConfig(
        eos_token_id=eos_ids or None, pad_token_id=pad_id)
    # Qwen2.5 has 151,936 or 152,064 output rows for one tokenizer; the last are padding.
    width = min(len(m.get_output_embeddings().weight) for m in (student, teacher))
    teacher.requires_grad_(False)
    return Pair(student, teacher, tokenizer, eos_ids, pad_id, width, temperature)

def read_prompts(path, pair, longest, room):  # -> [(prompt ids, reference ids)]
    """JSONL records; the last `longest` tokens of a prompt count (None: all), and both models must
    have `room` positions left for the response."""
    tokenizer, examples = pair.tokenizer, []
    limit = min(getattr(m.config, "max_position_embeddings", None) or 10**9 for m in pair[:2])
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts {path}: {error}")
    for number, line in enumerate(tqdm(lines, desc="reading prompts", disable=None), 1):
        try:
            record = json.loads(line)
            chat = "messages" in record
            text = record["prompt"] if not chat else tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=True)
            # Never two BOS: a chat template writes its own, and a text may bring one.
            bos = not chat and not text.startswith(tokenizer.bos_token or "\0")
            prompt = tokenizer(text, add_special_tokens=bos).input_ids[-(longest or 10**9):]
            reference = tokenizer(record.get("reference", ""), add_special_tokens=False).input_ids
        except Exception as error:  # no JSON, no such key, no text, no chat template
            fail(f"{path}, line {number}: not a record with `prompt` (text) or `messages` (chat) "
                 f"and perhaps `reference` (text): {' '.join(repr(error).split())}")
        if not 0 < len(prompt) <= limit - room:
            fail(f"{path}, line {number}: {len(prompt)} tokens; the models take 1 to {limit - room} "
                 f"before {room} new ones (see --max-prompt-tokens, --max-new-tokens)")
        examples.append((prompt, reference[:limit - len(prompt)]))
    return examples

# ---- Rollouts, and what the two models say about them.

class Rollout(NamedTuple):
    ids: torch.Tensor  # [B, P + R] left-padded prompt, then the response as sampled
    attention: torch.Tensor  # [B, P + R] 0 on the prompt's padding
    mask: torch.Tensor  # [B, R] bool, the valid response positions
    truncated: torch.Tensor  # [B] bool, no EOS before the length limit
    @property
    def tokens(self):  # [N]
        return self.ids[:, -self.mask.shape[1]:][self.mask]
    def split(self, size):
        """Micro-batches of `size` responses."""
        return [Rollout(*(x[i:i + size] for x in self)) for i in range(0, len(self.ids), size)]

def pad(rows, value, side):  # B lists -> [B, longest]
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)

@autocast
@torch.no_grad()
def rollout(pair, prompts, max_new_tokens):  # B lists of ids -> Rollout
    """Sample one response to each prompt, from the very distribution that is scored: no filter."""
    ids = pad(prompts, pair.pad_id, "left").to(pair.student.device)  # [B, P]
    attention = pad([[1] * len(prompt) for prompt in prompts], 0, "left").to(ids.device)
    extra = range(pair.width, len(pair.student.get_output_embeddings().weight))  # not the teacher's
    ids = pair.student.generate(
        ids, attention_mask=attention, max_new_tokens=max_new_tokens, do_sample=True, top_k=0,
        top_p=1.0, temperature=pair.temperature, suppress_tokens=list(extra) or None,
        remove_invalid_values=True)  # a student of nan is stopped by its loss, with the step's number
    responses = ids[:, attention.shape[1]:]  # [B, R]
    ended = torch.isin(responses, torch.tensor(pair.eos_ids, dtype=ids.dtype, device=ids.device))
    return Rollout(ids, torch.cat([attention, torch.ones_like(responses)], -1),
                   response_mask(responses, pair.eos_ids), ~ended.any(-1))

@autocast
def backbone(model, batch, size):  # -> [N, E]
    """The hidden states that predict the valid response tokens, `size` responses at a time. Logits
    are made of them in chunks: all at once, they would take 4 * B * R * V bytes several times."""
    states = []
    for part in batch.split(size):
        positions = (part.attention.cumsum(-1) - 1).clamp(min=0)  # GPT-2 must not count padding
        hidden = model.base_model(part.ids, attention_mask=part.attention, position_ids=positions,
                                  use_cache=False)[0]  # [B, P + R, E]
        states.append(hidden[:, -part.mask.shape[1] - 1:-1][part.mask])
    return torch.cat(states)

@autocast
def project(pair, model, hidden):  # [n, E] -> [n, V]
    """The logits that define p or q: float32, of the shared width, at the pair's temperature."""
    return model.get_output_embeddings()(hidden)[:, :pair.width].float() / pair.temperature

@torch.no_grad()
def measure(pair, batch, hidden, teacher_hidden, function):  # -> one [N, ...] for each result
    """Apply function(student_logits, teacher_logits, tokens) -> tuple to all positions, in chunks."""
    columns = (x.split(max(1, CHUNK // pair.width)) for x in (hidden, teacher_hidden, batch.tokens))
    results = [function(project(pair, pair.student, h), project(pair, pair.teacher, t), y)
               for h, t, y in zip(*columns)]
    return [torch.cat(result) for result in zip(*results)]

def backward(pair, kind, hidden, teacher_hidden, tokens, divisor):  # [n, E], [n, E'], [n] -> float
    """Backpropagate sum(loss) / divisor and return it. The chain rule is cut at the hidden states,
    so that one chunk's logits are freed before the next chunk's are made."""
    leaf, total = hidden.detach().requires_grad_(), 0.0
    columns = (x.split(max(1, CHUNK // pair.width)) for x in (leaf, teacher_hidden, tokens))
    for h, t, y in zip(*columns):
        with torch.no_grad():
            q = project(pair, pair.teacher, t)
        loss = token_loss(kind, project(pair, pair.student, h), q, y).sum() / divisor
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total

@torch.no_grad()
def evaluate(pair, examples, args):  # -> {name: mean}
    """Means over the positions of responses sampled with a fixed seed, over those responses, and
    over the tokens of the references. KL, entropy, NLL in nats; agreement of both first choices."""
    torch.manual_seed(args.seed)
    size, rows = args.micro_batch_size or args.batch_size, ([], [], [])
    def compare(batch, function):
        hidden, teacher_hidden = (backbone(m, batch, size) for m in (pair.student, pair.teacher))
        return torch.stack(measure(pair, batch, hidden, teacher_hidden, function)).float()
    for i in tqdm(range(0, len(examples), args.batch_size), desc="evaluating", disable=None):
        prompts, references = zip(*examples[i:i + args.batch_size])
        batch = rollout(pair, prompts, args.max_new_tokens)
        rows[0].append(compare(batch, lambda p, q, y: (
            reverse_kl(p, q), forward_kl(p, q), entropy(p), p.argmax(-1) == q.argmax(-1))))
        rows[1].append(torch.stack([batch.mask.sum(-1), batch.truncated]).float())
        if any(references):  # each stands where the response stood
            ids = torch.cat([pad(prompts, 0, "left"), pad(references, 0, "right")], -1)
            mask = pad([[True] * len(r) for r in references], False, "right")
            attention = torch.cat([pad([[True] * len(p) for p in prompts], False, "left"), mask], -1)
            batch = Rollout(*(x.to(batch.ids.device) for x in (ids, attention.long(), mask, mask[:, 0])))
            rows[2].append(compare(batch, lambda p, q, y: (
                F.cross_entropy(p, y, reduction="none"), p.argmax(-1) == y)))
    names = ("reverse_kl", "forward_kl", "entropy", "agreement", "mean_length", "truncated",
             "reference_nll", "reference_accuracy")
    means = torch.cat([torch.cat(part, -1).mean(-1) for part in rows if part])
    return dict(zip(names, means.tolist()))

# ---- Training: one pass of the loop is one step.

def train(pair, examples, args, out, first=0, optimizer_state=None):
    """Train in place, from step `first`. Chance depends on seed and step alone, so that a run
    resumes bit for bit from its weights and the optimizer's state."""
    student, size = pair.student, args.micro_batch_size or args.batch_size
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.1)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    for step in tqdm(range(first, args.steps), desc="training", disable=None):
        started = time.time()
        seed = torch.manual_seed(args.seed * 1_000_003 + step).initial_seed()
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        prompts = [examples[order[n % len(order)]][0] for n in numbers]

        batch = rollout(pair, prompts, args.max_new_tokens)  # 1. rollout
        rolled = time.time()

        with torch.set_grad_enabled(size >= args.batch_size):  # 2. score; update uses the same graph
            hidden = backbone(student, batch, size)
        with torch.no_grad():
            teacher_hidden = backbone(pair.teacher, batch, size)
        H, D, C, kl = (
            torch.zeros_like(batch.mask, dtype=z.dtype).masked_scatter(batch.mask, z)  # [B, R]
            for z in measure(pair, batch, hidden, teacher_hidden, lambda p, q, y: (
                entropy(p), divergence(p, q, args.top_k), compatibility(p, q, args.top_k),
                reverse_kl(p, q))))

        scores = position_scores(args.select, H, D, C, batch.mask, generator.manual_seed(seed))
        keep = select_positions(scores, batch.mask, 1 if args.select == "full" else args.budget)
        kept, valid, selected = int(keep.sum()), int(batch.mask.sum()), time.time()  # 3. select

        loss, parts = 0.0, batch.split(size)  # 4. update
        counts = [len(part.tokens) for part in parts]
        for part, t, rows in zip(parts, teacher_hidden.split(counts), keep[batch.mask].split(counts)):
            if rows.any():
                h = hidden if len(parts) == 1 else backbone(student, part, size)
                loss += backward(pair, args.loss, h[rows], t[rows], part.tokens[rows], divisor=kept)
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        if not math.isfinite(loss + norm):
            fail(f"step {step}: loss {loss}, gradient norm {norm}; lower --lr. Saves are intact", 1)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10)  # short warm-up
        optimizer.step()
        optimizer.zero_grad()

        H, D, C, kl = (float(z[batch.mask].mean()) for z in (H, D, C, kl))
        line = {"step": step, "loss": loss, "kl_all": kl, "kept": kept, "valid": valid, "entropy": H,
                "divergence": D, "compatibility": C, "mean_length": valid / len(prompts),
                "truncated": float(batch.truncated.float().mean()),
                "padding": 1 - valid / keep.numel(), "lr": optimizer.param_groups[0]["lr"],
                "rollout_seconds": rolled - started, "score_seconds": selected - rolled,
                "seconds": time.time() - started}
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        tqdm.write(f"step {step}  loss {loss:.3f}  kl_all {kl:.3f}  kept {kept}/{valid}  H {H:.2f}  "
                   f"D {D:.3f}  C {C:.3f}  length {valid / len(prompts):.1f}  {line['seconds']:.2f} s")
        if step % 20 == 0:
            texts = pair.tokenizer.batch_decode([prompts[0], batch.split(1)[0].tokens])
            tqdm.write("  sample: {!r} -> {!r}".format(*texts))
        if args.save_every and (step + 1) % args.save_every == 0:
            save(pair, out / f"step-{step + 1}", (step + 1, optimizer.state_dict()))
            for older in saves(out)[:-1]:
                shutil.rmtree(older)

def saves(out):  # the folders that --save-every has left, oldest first
    return sorted(out.glob("step-*[0-9]"), key=lambda folder: int(folder.name[5:]))

def save(pair, folder, state=None):
    """Write beside, then rename: at any moment, what is called `folder` is complete."""
    beside = folder.with_name(folder.name + ".partial")
    try:
        pair.student.save_pretrained(beside)
        pair.tokenizer.save_pretrained(beside)
        torch.save(state, beside / "state.pt")
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, since resumed
        beside.rename(folder)
    except Exception as error:  # every library has an exception of its own for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        fail(f"{folder} could not be written ({error}); earlier saves are intact", 1)

# ---- The embedded pair, the command line, the program.

PAIR = Path("runs/pair")
DEMO = {"student": f"{PAIR}/student", "teacher": f"{PAIR}/teacher", "prompts": f"{PAIR}/prompts.jsonl",
        "steps": 100, "batch_size": 24, "max_new_tokens": 40, "lr": 3e-4, "eval_prompts": 300}

def build_pair():
    """Train a teacher, and a smaller student for less long, on the text of Python's own manual, and
    save them as ordinary model folders. The last tenth of the text is held out from everything."""
    paragraphs = (" ".join(p.split()) for key in sorted(topics) for p in topics[key].split("\n\n"))
    paragraphs = [p for p in dict.fromkeys(paragraphs) if p]  # topics quote each other: once each
    cut = len(paragraphs) * 9 // 10
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(paragraphs[:cut], 1024, special_tokens=["<eos>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<eos>")
    documents = [tokenizer(p).input_ids + [tokenizer.eos_token_id] for p in paragraphs]
    stream = torch.tensor(sum(documents[:cut], []))
    beside = PAIR.with_name("pair.partial")
    for name, layers, width, steps, rows in (("teacher", 4, 128, 600, 24), ("student", 2, 96, 300, 16)):
        torch.manual_seed(layers)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32,
            max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
        for _ in tqdm(range(steps), desc=f"building the demo's {name}", disable=None):
            ids = stream[torch.randint(len(stream) - 64, (rows, 1)) + torch.arange(64)]
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(beside / name)
        tokenizer.save_pretrained(beside / name)
    windows = [[ids[i:i + 64] for i in range(0, len(ids) - 32, 24)] for ids in documents]
    windows = sum(windows[:cut], []) + sum(windows[cut:], [])[:DEMO["eval_prompts"]]
    with open(beside / "prompts.jsonl", "w") as file:
        for ids in windows:
            text = tokenizer.batch_decode([ids[:24], ids[24:]], skip_special_tokens=True)
            file.write(json.dumps({"prompt": text[0], "reference": text[1]}) + "\n")
    beside.rename(PAIR)  # last: an interrupted build is never mistaken for a finished one

def parse_args(argv=None, parser=None):
    """opd.py's flags, beside those that `parser` may bring."""
    parser = parser or argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error, add = fail, parser.add_argument  # one line, status 2
    add("--student", help="model to train: a folder or hub name (default: the embedded pair's)")
    add("--teacher", help="frozen model with the same tokenizer")
    add("--prompts", help="JSONL file of `prompt` or `messages`, and perhaps `reference`")
    add("--select", choices=METHODS, default="teachability", help="which positions to train on")
    add("--budget", type=float, default=0.1, help="share of positions kept, in (0, 1]")
    add("--top-k", type=int, default=16, help="K of D and C, in tokens")
    add("--loss", choices=("reverse_kl", "forward_kl", "sampled"), default="reverse_kl")
    add("--temperature", type=float, default=1.0, help="of sampling, scoring and loss alike")
    add("--steps", type=int, default=200, help="optimizer steps (demo: 100)")
    add("--batch-size", type=int, default=8, help="responses per step (demo: 24)")
    add("--micro-batch-size", type=int, help="responses per forward pass (default: the batch)")
    add("--max-prompt-tokens", type=int, help="keep only so many last tokens of a prompt")
    add("--max-new-tokens", type=int, default=512, help="length limit of a response (demo: 40)")
    add("--lr", type=float, default=1e-6, help="after 10 steps of warm-up (demo: 3e-4)")
    add("--eval-prompts", type=int, default=64, help="last prompts, held out (demo: 300)")
    add("--seed", type=int, default=0, help="of prompt order, sampling and `random`")
    add("--out", help="folder for student/, log.jsonl, summary.json (default: a new runs/opd-N)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--save-every", type=int, help="steps between saves for --resume (default: no saves)")
    add("--resume", metavar="OUT", help="continue the run in that folder from its last save")
    args = parser.parse_args(argv)
    if args.resume:
        try:
            stored = json.loads((Path(args.resume) / "summary.json").read_text())["args"]
        except (OSError, ValueError, KeyError) as error:
            fail(f"--resume {args.resume}: no run is there ({error})")
        parser.set_defaults(**{**stored, "out": args.resume})
    elif not (args.student or args.teacher or args.prompts):
        parser.set_defaults(**DEMO)
    elif not (args.student and args.teacher and args.prompts):
        fail("--student, --teacher and --prompts belong together; without all three the demo runs")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = (0, 10**9) if name in ("seed", "lr") else (1e-9, 1 if name == "budget" else 10**9)
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    return args

def prepare(args, student):  # -> Pair, training examples, held-out examples
    if args.student == DEMO["student"] and not PAIR.exists():
        build_pair()
    pair = load_pair(student, args.teacher, args.temperature, args.device)
    examples = read_prompts(args.prompts, pair, args.max_prompt_tokens, args.max_new_tokens)
    needed = args.batch_size + args.eval_prompts
    if len(examples) < needed:
        fail(f"{args.prompts} has {len(examples)} prompts; the batch and the held-out set need {needed}")
    return pair, examples[:-args.eval_prompts], examples[-args.eval_prompts:]

def new_folder(out, stem, result):  # -> Path
    """--out, which must not hold a result yet, or the first free runs/stem-N."""
    folders = (Path(f"runs/{stem}-{n}") for n in range(1, 10**6))
    out = Path(out) if out else next(folder for folder in folders if not folder.exists())
    if (out / result).exists():
        fail(f"--out {out} already holds a run; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "log.jsonl", "")
    except OSError as error:
        fail(f"--out {out} cannot be written: {error}")
    return out

def write(path, text):
    """Write beside, then rename, as `save` does."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)

def main(args):
    """Evaluate, train, save, evaluate."""
    started, first, state, source = time.time(), 0, None, args.student
    if args.resume:
        out = Path(args.resume)
        if not saves(out):
            fail(f"--resume {out}: there is no save (--save-every makes them)")
        source = saves(out)[-1]
        first, state = torch.load(source / "state.pt", map_location="cpu")
        summary = json.loads((out / "summary.json").read_text())
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
        write(out / "log.jsonl", "".join(lines[:first]))  # what came after the save is redone
    pair, training, held_out = prepare(args, source)
    if not args.resume:
        out = new_folder(args.out, "opd", "summary.json")
        versions = {m.__name__: m.__version__ for m in (torch, transformers)}
        summary = {"args": vars(args), "versions": versions, "before": evaluate(pair, held_out, args)}
        write(out / "summary.json", json.dumps(summary, indent=1))
    try:
        train(pair, training, args, out, first, state)
    except KeyboardInterrupt:
        save(pair, out / "student")
        fail(f"interrupted; the student as it is now is in {out / 'student'}", 130)
    save(pair, out / "student")
    summary |= {"after": evaluate(pair, held_out, args), "seconds": time.time() - started}
    write(out / "summary.json", json.dumps(summary, indent=1))
    print(f"{'held-out prompts':20}{'before':>10}{'after':>10}")
    for name, before in summary["before"].items():
        print(f"{name:20}{before:10.4f}{summary['after'][name]:10.4f}")
    print(f"{summary['seconds']:.0f} s; student/, log.jsonl and summary.json are in {out}")

def run(program):
    """The program, with one line for each way in which it can be stopped from outside."""
    try:
        program()
    except KeyboardInterrupt:
        fail("interrupted; nothing was lost that had been saved", 130)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro-batch-size, then --batch-size, --max-new-tokens", 1)
    except OSError as error:
        fail(f"{error}; what was saved before is intact", 1)

if __name__ == "__main__":
    run(lambda: main(parse_args()))
