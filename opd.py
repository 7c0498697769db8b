"""Token-selective on-policy distillation (OPD) in one file.

A student language model writes its own responses, a frozen teacher scores every token of them, and
the student moves towards the teacher at the few positions where it can learn from it ("Not All
Disagreement Is Learnable", arXiv 2605.26844). One training step, in `train`:

  1. rollout  the student samples a response to each prompt
  2. score    at each response position: the student's entropy H, its disagreement D with the
              teacher, and C, the teacher's probability mass on the student's own candidates
  3. select   D splits into D*C (learnable) and D*(1-C) (incompatible); the best `budget` share of
              the batch's positions is kept
  4. update   one optimizer step on the mean reverse KL(student || teacher) of the kept positions

p is the student's, q the teacher's next-token distribution; KL and entropy in nats. B responses, P
prompt tokens, R response positions, V vocabulary, N valid positions, E hidden width. "Top-k" is
always K, the support of D and C; the share of positions kept is `budget`; sampling has no filter.
Left out on purpose: several GPUs, LoRA, inference servers, activation checkpointing.
"""
import argparse, json, math, random, re, sys, time
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple
import numpy, torch, transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm

METHODS = ("full", "teachability", "teachability_entropy", "entropy", "divergence", "tip",
           "compatibility", "incompatible", "random")
CHUNK = 2**24  # logits of one model at once: 64 MiB, which the allocator gives back when freed
BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
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
    """D = KL(q|U || p|U) in nats: U is the union of both top-K sets, p and q renormalised on it.
    Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    mine, theirs = (z.topk(min(k, z.shape[-1])).indices for z in (student_logits, teacher_logits))
    shared = (theirs[..., :, None] == mine[..., None, :]).any(-1)  # in both sets: counts once
    union, twice = torch.cat([mine, theirs], -1), torch.cat([torch.zeros_like(shared), shared], -1)
    # A softmax over the logits of U renormalises on U. -1e30, not -inf: 0 * inf would be nan.
    logp, logq = (z.gather(-1, union).float().masked_fill(twice, -1e30).log_softmax(-1)
                  for z in (student_logits, teacher_logits))  # [..., 2K] each
    return (logq.exp() * (logq - logp)).sum(-1)

def compatibility(student_logits, teacher_logits, k):  # [..., V], [..., V] -> [...]
    """C = the teacher's probability mass on the student's top-K tokens, in [0, 1].
    Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
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
              # Soft OR: h + d - h * d, in a form that ties exactly where h or d is 1.
              "teachability_entropy": 1 - (1 - h) * (1 - learnable),
              "tip": 1 - (1 - h) * (1 - d),
              "entropy": h, "divergence": d, "compatibility": c, "incompatible": incompatible}
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
    """True up to and including the first EOS: the end is taught, even where pad is that same id."""
    is_end = torch.isin(responses, torch.tensor(eos_ids).to(responses))
    return is_end.cumsum(-1) - is_end.long() == 0

def token_loss(kind, student_logits, teacher_logits, tokens):  # [..., V] twice, [...] -> [...]
    """`reverse_kl`, `forward_kl`, or `sampled`: -A log p(y), A = log q(y) - log p(y) held constant.
    Over y ~ p, the expected gradient of `sampled` is that of `reverse_kl`. In nats."""
    if kind != "sampled":
        return (reverse_kl if kind == "reverse_kl" else forward_kl)(student_logits, teacher_logits)
    logp, logq = (logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
                  for logits in (student_logits, teacher_logits))
    return -(logq - logp).detach() * logp

# ---- Two models with one vocabulary, and prompts for them.
class Pair(NamedTuple):
    student: torch.nn.Module  # float32 weights: in bf16 an update of 1e-6 rounds to nothing
    teacher: torch.nn.Module  # frozen; bf16 on a GPU
    tokenizer: transformers.PreTrainedTokenizerBase
    eos_ids: list  # whatever ends a response for either model
    width: int  # V, the ids that both models predict
    temperature: float  # one for sampling, scoring and loss

def fail(message, status=2):  # one clear line, no traceback
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)

def load_model(flag, path, dtype, device):  # -> model, tokenizer, EOS ids
    try:  # weights from safetensors only, and no code from the model's repository
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False).to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # also of the device
        fail(f"{flag} {path} on {device}: {' '.join(str(error).split())}")
    model.eval()  # for good: with dropout, the update would not see the distribution sampled from
    ids = torch.arange(3, device=device)[None]
    projected = model.get_output_embeddings()(model.base_model(ids)[0]).float()
    own = model(ids).logits.float()  # by a GPU's kernels, not always the same to the last bit
    if (own - projected).abs().max() > 0.01 * own.abs().max():
        fail(f"{flag} {path}: {model.config.model_type} models cap or scale their logits: refused")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return model, tokenizer, ends

def load_pair(student_path, teacher_path, temperature=1.0, device="cpu"):
    """Load both models and check that they can be compared token by token."""
    half = torch.bfloat16 if BF16 and device.startswith("cuda") else torch.float32
    student, tokenizer, ends = load_model("--student", student_path, torch.float32, device)
    teacher, other, teacher_ends = load_model("--teacher", teacher_path, half, device)
    mine, theirs, added = tokenizer.get_vocab(), other.get_vocab(), other.get_added_vocab()
    added |= tokenizer.get_added_vocab()
    differ = [token for token in sorted(mine | theirs) if mine.get(token) != theirs.get(token)]
    for token in sorted(differ, key=added.__contains__)[:1]:  # an ordinary one, if there is any
        text = f"differ: {token!r} is {mine.get(token)} to one, {theirs.get(token)} to the other"
        if token not in added:
            fail(f"the models' tokenizers {text}; choose two with one vocabulary")
        print(f"warning: only added or special tokens {text}; going on", file=sys.stderr)
    eos_ids = sorted(ends | teacher_ends)  # a base student may stop the way its chat teacher does
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens((eos_ids + [0])[0])
    student.generation_config = transformers.GenerationConfig(  # no top_k=20 of a checkpoint's own
        eos_token_id=eos_ids or None, pad_token_id=tokenizer.pad_token_id)
    # Qwen2.5 has 151,936 or 152,064 output rows for one tokenizer; the last are padding.
    width = min(len(m.get_output_embeddings().weight) for m in (student, teacher))
    return Pair(student, teacher.requires_grad_(False), tokenizer, eos_ids, width, temperature)

def read_prompts(path, pair, longest, room):  # -> [(prompt ids, answer or None)]
    """JSONL records. Of a prompt the last `longest` tokens count; `room` more must fit in."""
    tokenizer, examples = pair.tokenizer, []
    limit = min(getattr(m.config, "max_position_embeddings", None) or 10**9 for m in pair[:2])
    lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            record = json.loads(line)
            chat, answer = "messages" in record, record.get("answer")
            text = record["prompt"] if not chat else tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=True)
            # Never two BOS: a chat template writes its own, and a text may bring one.
            bos = not chat and not text.startswith(tokenizer.bos_token or "\0")
            prompt = tokenizer(text, add_special_tokens=bos).input_ids[-(longest or 10**9):]
            assert answer is None or answer.strip(" ."), "empty answer"
        except Exception as error:  # no JSON, no such key, no text, no chat template
            fail(f"{path}, line {number}: `prompt` or `messages`, perhaps `answer`: {error!r}")
        if not 0 < len(prompt) <= limit - room:
            fail(f"{path}, line {number}: {len(prompt)} tokens; with {room} new ones, 1 to {limit} "
                 "fit (--max-prompt-tokens, --max-new-tokens)")
        examples.append((prompt, answer))
    return examples

def is_right(response, answer):  # two texts
    """Is the last number in both the same? For an answer without one: does the response end so?"""
    number = r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    said, wanted = ([Decimal(n.replace(",", "")) for n in re.findall(number, text)[-1:]]
                    for text in (response, answer))
    return said == wanted if wanted else response.rstrip(" .\n").endswith(answer.strip(" .\n"))

# ---- One step: rollout, score, select, update, and a line of log.
class Rollout(NamedTuple):
    ids: torch.Tensor  # [B, P + R] left-padded prompt, then the response as sampled
    attention: torch.Tensor  # [B, P + R] 0 on the prompt's padding
    mask: torch.Tensor  # [B, R] bool, the valid response positions
    logp: torch.Tensor  # [B, R] log p of each response token when it was sampled
    truncated: torch.Tensor  # [B] bool, no EOS before the length limit

def tokens(batch):  # -> [N], the responses' tokens, row by row
    return batch.ids[:, -batch.mask.shape[1]:][batch.mask]

def split(batch, size):  # -> micro-batches of `size` responses
    return [Rollout(*(x[i:i + size] for x in batch)) for i in range(0, len(batch.ids), size)]

@autocast
@torch.no_grad()
def rollout(pair, prompts, max_new_tokens):  # B lists of ids -> Rollout
    """Sample one response to each prompt, from the very distribution that is scored: no filter."""
    inputs = pair.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs, logp = inputs.to(pair.student.device), []

    def next_token(ids, logits):  # [B, t], [B, rows] -> [B, V], to draw from
        if logp:  # what the step before has drawn is known by now: keep its log p alone
            logp[-1] = logp[-1].gather(-1, ids[:, -1:])
        logits = logits[:, :pair.width] / pair.temperature
        logp.append(logits.log_softmax(-1))
        return logits.nan_to_num()  # let the loss meet the nan: it can tell in which step
    ids = pair.student.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=0,
                                top_p=1.0, temperature=1.0, logits_processor=[next_token])
    logp[-1] = logp[-1].gather(-1, ids[:, -1:])
    responses = ids[:, inputs.input_ids.shape[1]:]  # [B, R]
    ended = torch.isin(responses, torch.tensor(pair.eos_ids).to(ids)).any(-1)
    return Rollout(ids, torch.cat([inputs.attention_mask, torch.ones_like(responses)], -1),
                   response_mask(responses, pair.eos_ids), torch.cat(logp, -1), ~ended)

# The logits of a whole batch would take 4 * B * R * V bytes, several times over. So the models run
# only as far as their last hidden states; of these the logits are made, used and freed chunk by
# chunk. `update` cuts the chain rule at the same place: the chunks' gradients gather at the hidden
# states, and one backward pass takes them through the model.
@autocast
def hidden_states(model, batch, size):  # -> [N, E]
    """Those that predict the valid response tokens, `size` responses at a time."""
    states = []
    for part in split(batch, size):
        positions = (part.attention.cumsum(-1) - 1).clamp(min=0)  # GPT-2 must not count padding
        hidden = model.base_model(part.ids, attention_mask=part.attention, position_ids=positions,
                                  use_cache=False)[0]  # [B, P + R, E]
        states.append(hidden[:, -part.mask.shape[1] - 1:-1][part.mask])
    return torch.cat(states)

def in_chunks(pair, hidden, teacher_hidden, tokens, function):  # [N, E], [N, E'], [N]
    """-> [N, ...] for each result of function(student_logits, teacher_logits, tokens), where the
    logits are those that define p and q: float32, of the shared width, at one temperature."""
    def logits(model, hidden):  # [n, E] -> [n, V]
        with autocast:
            return model.get_output_embeddings()(hidden)[:, :pair.width].float() / pair.temperature
    chunks = zip(*(x.split(max(1, CHUNK // pair.width)) for x in (hidden, teacher_hidden, tokens)))
    results = [function(logits(pair.student, h), logits(pair.teacher, t), y) for h, t, y in chunks]
    return [torch.cat(result) for result in zip(*results)]

@torch.no_grad()
def measure(pair, batch, size, function):  # -> [N, ...] for each result, without gradient
    states = [hidden_states(model, batch, size) for model in (pair.student, pair.teacher)]
    return in_chunks(pair, *states, tokens(batch), function)

def score(pair, batch, args):  # -> {name: [B, R]}, (hidden states of student and teacher)
    """What the two models say about every valid position of the rollout; 0 at all others."""
    size, k = args.micro_batch_size, args.top_k
    with torch.set_grad_enabled(size >= len(batch.ids)):  # then the update needs no second forward
        hidden = hidden_states(pair.student, batch, size)
    with torch.no_grad():
        teacher_hidden = hidden_states(pair.teacher, batch, size)
        *values, logp = in_chunks(pair, hidden, teacher_hidden, tokens(batch), lambda p, q, y: (
            reverse_kl(p, q), entropy(p), divergence(p, q, k), compatibility(p, q, k),
            -torch.nn.functional.cross_entropy(p, y, reduction="none")))
    values.append((logp - batch.logp[batch.mask]).abs())  # rounding, if all is well
    names = "kl_all", "entropy", "divergence", "compatibility", "sampling_gap"
    zeros = torch.zeros_like(batch.logp)
    return ({name: zeros.masked_scatter(batch.mask, z) for name, z in zip(names, values)},
            (hidden, teacher_hidden))

def select(scores, mask, args, chance):  # -> [B, R] bool
    """The positions to train on, chosen among those of the whole batch."""
    H, D, C = (scores[name] for name in ("entropy", "divergence", "compatibility"))
    ranks = position_scores(args.select, H, D, C, mask, chance)
    return select_positions(ranks, mask, 1 if args.select == "full" else args.budget)

def update(pair, optimizer, batch, hidden, keep, args):  # -> loss, norm of its gradient
    """One step on the mean loss of the kept positions, counted over the whole batch, so that
    micro-batches change nothing. No step is taken where loss or gradient are not finite."""
    def backward(p, q, y):  # a chunk's share of the mean and of its gradient
        loss = token_loss(args.loss, p, q, y) / keep.sum()
        loss.sum().backward()
        return (loss.detach(),)
    loss, size = 0.0, args.micro_batch_size
    mine, theirs = (states[keep[batch.mask]] for states in hidden)
    parts = split(batch._replace(mask=keep), size)
    for part, target in zip(parts, theirs.split([int(part.mask.sum()) for part in parts])):
        states = mine if len(parts) == 1 else hidden_states(pair.student, part, size)
        leaf = states.detach().requires_grad_()
        loss += float(in_chunks(pair, leaf, target, tokens(part), backward)[0].sum())
        states.backward(leaf.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0))
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm

def log(out, bar, args, step, times, batch, scores, keep, loss, norm, lr):
    """A line of log.jsonl for each step, a row in the terminal for each tenth of the run."""
    valid, (start, rolled, selected, end) = int(batch.mask.sum()), times
    means = {name: float(z.sum()) / valid for name, z in scores.items()}
    line = {"step": step, "loss": loss, **means, "mean_length": valid / len(keep),
            "truncated": float(batch.truncated.float().mean()), "seconds": end - start,
            "rollout_seconds": rolled - start, "score_seconds": selected - rolled,
            "kept": int(keep.sum()), "valid": valid, "padding": 1 - valid / keep.numel(),
            "gradient_norm": norm, "lr": lr}
    shown = [name for name in list(line)[:10] if name != "sampling_gap"]
    with open(out / "log.jsonl", "a") as file:
        if not file.tell():  # the first line gets a heading
            tqdm.write("  ".join(f"{name:>7}" for name in shown))
        file.write(json.dumps(line) + "\n")
    if step % max(1, args.steps // 10) == 0 or step + 1 == args.steps:
        tqdm.write("  ".join(f"{line[name]:{max(7, len(name))}.4g}" for name in shown))
    bar.set_postfix(kl_all=f"{means['kl_all']:.4f}", refresh=False)

# ---- Training, and what it changed.
def train(pair, examples, args, out):
    """Train in place. Chance depends on seed and step alone: --resume continues bit for bit."""
    optimizer = torch.optim.AdamW(pair.student.parameters(), weight_decay=0.1, fused=True)
    first, chance = 0, torch.Generator().manual_seed(args.seed)
    if args.resume:
        first, state = torch.load(Path(args.resume) / "state.pt", map_location="cpu")
        optimizer.load_state_dict(state)
    order = torch.randperm(len(examples), generator=chance).tolist()
    bar = tqdm(range(first, args.steps), desc="training", disable=None)
    for step in bar:
        times, seed = [time.time()], args.seed * 1_000_003 + step
        torch.manual_seed(seed)
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        prompts = [examples[order[n % len(order)]][0] for n in numbers]
        batch = rollout(pair, prompts, args.max_new_tokens)
        times.append(time.time())
        scores, hidden = score(pair, batch, args)
        keep = select(scores, batch.mask, args, chance.manual_seed(seed))
        times.append(time.time())
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10)  # short warm-up
        loss, norm = update(pair, optimizer, batch, hidden, keep, args)
        if not math.isfinite(loss + norm):
            fail(f"step {step}: loss {loss}, gradient norm {norm}; lower --lr. Saves are intact", 1)
        times.append(time.time())
        log(out, bar, args, step, times, batch, scores, keep, loss, norm, lr)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(pair, out / f"step-{step + 1}", (step + 1, optimizer.state_dict()))

def save(pair, folder, state=None):
    """Write beside, then rename: at any moment, what is called `folder` is complete."""
    beside = folder.with_name(folder.name + ".partial")
    try:
        pair.student.save_pretrained(beside)
        pair.tokenizer.save_pretrained(beside)
        if state:
            torch.save(state, beside / "state.pt")
        beside.rename(folder)
    except Exception as error:  # every library has an exception of its own for a full disk
        fail(f"{folder} could not be written ({error}); earlier saves are intact", 1)

def evaluate(pair, examples, args):  # -> {name: mean}
    """Of responses sampled with a fixed seed: the share of right answers, KL and entropy in nats,
    agreement of both models' first choices, length in tokens, share cut off by the limit."""
    torch.manual_seed(args.seed)
    right, lengths, truncated, positions = [], [], [], []
    size = 4 * args.batch_size  # without gradients more fit in at once, which is faster
    for i in tqdm(range(0, len(examples), size), desc="evaluating", disable=None):
        prompts, answers = zip(*examples[i:i + size])
        batch = rollout(pair, prompts, args.max_new_tokens)
        texts = [pair.tokenizer.decode(tokens(one), skip_special_tokens=True)
                 for one in split(batch, 1)]
        if i == 0:
            tqdm.write(f"sample: {pair.tokenizer.decode(prompts[0])!r} -> {texts[0]!r}")
        right += [is_right(text, answer) for text, answer in zip(texts, answers) if answer]
        lengths += batch.mask.sum(-1).tolist()
        truncated += batch.truncated.tolist()
        positions.append(measure(pair, batch, args.micro_batch_size, lambda p, q, y: (
            reverse_kl(p, q), forward_kl(p, q), entropy(p), p.argmax(-1) == q.argmax(-1))))
    names = "reverse_kl", "forward_kl", "entropy", "agreement"
    columns = {"accuracy": right} | dict(zip(names, map(torch.cat, zip(*positions)))) | {
        "mean_length": lengths, "truncated": truncated}
    return {name: float(sum(z) / len(z)) for name, z in columns.items() if len(z)}

# ---- The embedded pair, the command line, the program.
PAIR = Path("runs/pair")
DEMO = {"student": f"{PAIR}/student", "teacher": f"{PAIR}/teacher", "steps": 100, "lr": 3e-4,
        "prompts": f"{PAIR}/prompts.jsonl", "batch_size": 12, "max_new_tokens": 64,
        "eval_prompts": 192}

def problem(thing, start, step, dice, slips=0.0, style=0.0):  # -> prompt, response, answer
    """Four sums on a clock of 24 hours. Half of all sums are hard: of these the writer of the
    response gets a share `slips` one too high. For "gets" it says "obtains" in a share `style`."""
    hour, sentences = start, []
    for ordinal in ("First", "Second", "Third", "Fourth"):
        hard = random.Random(100 * hour + step).random() < 0.5  # the same sums for ever
        total = (hour + step + (hard and dice.random() < slips) - 1) % 24 + 1
        name, verb = dice.choice(("Ada", "Ben", "Cleo", "Dan")), ("gets", "obtains")
        sentences.append(f"{ordinal} {name} adds {step} to {hour} and "
                         f"{verb[dice.random() < style]} {total}.")
        hour = total
    return (f"A {thing} starts at {start} and returns every {step} hours:",
            f"{' '.join(sentences)} So it ends at {hour}.", str((start + 4 * step - 1) % 24 + 1))

def build_pair():
    """Train a teacher that adds well, and a smaller student that slips, and that reads "obtains"
    but never learns to write it. A quarter of the sums to do is held out from everything."""
    dice = random.Random(0)
    cases = [(start, step) for start in range(1, 25) for step in range(2, 10)]
    dice.shuffle(cases)
    cases = [(thing, *case) for case in cases for thing in ("bus", "ship", "train", "comet")]
    def texts(count, **habits):
        drawn = dice.choices(cases[:-DEMO["eval_prompts"]], k=count)
        return [" ".join(problem(*case, dice, **habits)[:2]) + "<eos>" for case in drawn]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(2000, style=0.5), 380, special_tokens=["<eos>"],
                            show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<eos>")
    words = "<eos>", ":", "Ġgets", "Ġobtains"
    eos, colon, gets, obtains = (tokenizer.convert_tokens_to_ids(word) for word in words)
    beside = PAIR.with_name("pair.partial")
    for name, layers, steps, slips in (("teacher", 3, 1300, 0), ("student", 2, 1000, 0.7)):
        torch.manual_seed(layers)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=380, hidden_size=96, intermediate_size=288, num_hidden_layers=layers,
            num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=256,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos, pad_token_id=eos))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
        for _ in tqdm(range(steps), desc=f"building the demo's {name}", disable=None):
            ids, mask = tokenizer(texts(32, slips=slips, style=0.7), padding=True,
                                  return_tensors="pt", return_token_type_ids=False).values()
            labels = ids.where(((ids == colon).cumsum(-1) > 0) & (mask == 1), -100)  # responses
            if name == "student":
                labels[labels == obtains] = gets
            optimizer.zero_grad()
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(beside / name)
        tokenizer.save_pretrained(beside / name)
    problems = (problem(*case, dice) for case in cases)
    (beside / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, _, answer in problems))
    beside.rename(PAIR)  # last: an interrupted build is never mistaken for a finished one

def parse_args(argv=None, parser=None):
    """opd.py's flags, beside those that `parser` may bring."""
    parser = parser or argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error, add = fail, parser.add_argument  # one line, status 2
    add("--student", help="model to train: a folder or hub name (default: the embedded pair's)")
    add("--teacher", help="frozen model with the same tokenizer")
    add("--prompts", help="JSONL file of `prompt` or `messages`, and perhaps `answer`")
    add("--select", choices=METHODS, default="teachability", help="which positions to train on")
    add("--budget", type=float, default=0.1, help="share of positions kept, in (0, 1]")
    add("--top-k", type=int, default=16, help="K of D and C, in tokens")
    add("--loss", choices=("reverse_kl", "forward_kl", "sampled"), default="reverse_kl")
    add("--temperature", type=float, default=1.0, help="of sampling, scoring and loss alike")
    add("--steps", type=int, default=200, help="optimizer steps (demo: 100)")
    add("--batch-size", type=int, default=8, help="responses per step (demo: 12)")
    add("--micro-batch-size", type=int, help="responses per forward pass (default: the batch)")
    add("--max-prompt-tokens", type=int, help="keep only so many last tokens of a prompt")
    add("--max-new-tokens", type=int, default=512, help="length limit of a response (demo: 64)")
    add("--lr", type=float, default=1e-6, help="after 10 steps of warm-up (demo: 3e-4)")
    add("--eval-prompts", type=int, default=64, help="last prompts, held out (demo: 192)")
    add("--seed", type=int, default=0, help="of prompt order, sampling and `random`")
    add("--out", help="new folder for student/, log.jsonl, summary.json (default: runs/NAME-N)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--save-every", type=int, help="steps between saves OUT/step-N (default: none)")
    add("--resume", metavar="OUT/step-N", help="continue from that save; give the same other flags")
    args = parser.parse_args(argv)
    if not (args.student or args.teacher or args.prompts):
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    elif not (args.student and args.teacher and args.prompts):
        fail("--student, --teacher and --prompts belong together; without all three the demo runs")
    for name, value in vars(args).items():
        low, high = 0 if name == "seed" else 1e-9, 1 if name == "budget" else 2**31
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args

def prepare(args):  # -> Pair, training examples, held-out examples
    if args.student == DEMO["student"] and not PAIR.exists():
        build_pair()
    pair = load_pair(args.resume or args.student, args.teacher, args.temperature, args.device)
    examples = read_prompts(args.prompts, pair, args.max_prompt_tokens, args.max_new_tokens)
    needed = args.batch_size + args.eval_prompts
    if len(examples) < needed:
        fail(f"{args.prompts} has {len(examples)} prompts; batch and held-out set need {needed}")
    return pair, examples[:-args.eval_prompts], examples[-args.eval_prompts:]

def new_folder(out, stem):  # -> Path, new or empty: --out, or the first free runs/stem-N
    free = (Path(f"runs/{stem}-{n}") for n in range(1, 10**6))
    out = Path(out) if out else next(folder for folder in free if not folder.exists())
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        fail(f"--out {out} is not empty, and nothing is ever overwritten; choose another folder")
    return out

def main(args):
    """Evaluate, train, save, evaluate."""
    started = time.time()
    pair, training, held_out = prepare(args)
    out = new_folder(args.out, "opd")
    before = evaluate(pair, held_out, args)
    try:
        train(pair, training, args, out)
    except KeyboardInterrupt:
        save(pair, out / "student")
        fail(f"interrupted; the student as it is now is in {out / 'student'}", 130)
    save(pair, out / "student")
    after, seconds = evaluate(pair, held_out, args), time.time() - started
    (out / "summary.json").write_text(json.dumps({
        "args": vars(args), "seconds": seconds, "before": before, "after": after,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)}}))
    print(f"{'held-out prompts':20}{'before':>10}{'after':>10}", *(
        f"{name:20}{before[name]:10.4f}{after[name]:10.4f}" for name in before), sep="\n")
    print(f"{seconds:.0f} s; student/, log.jsonl and summary.json are in {out}")

def run(program):  # whatever stops it from outside gets one line, too
    transformers.logging.disable_progress_bar()  # of loading and saving: the steps have their own
    try:
        program()
    except KeyboardInterrupt:
        fail("interrupted; what had been saved is intact", 130)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro-batch-size, then --batch-size", 1)
    except (OSError, UnicodeDecodeError) as error:
        fail(error)

if __name__ == "__main__":
    run(lambda: main(parse_args()))
