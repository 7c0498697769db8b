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

p is the student's, q the teacher's next-token distribution; KL and entropy in nats. B responses, P
prompt tokens, R response positions, V vocabulary, N valid positions, E hidden width. "Top-k" is
always K, the support of D and C; the share of positions kept is `budget`; sampling has no filter.
Left out on purpose: several GPUs, LoRA, inference servers, activation checkpointing.
"""
import argparse, json, math, sys, time
from itertools import starmap
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple
import numpy
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.nn.functional import cross_entropy
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
    ends = torch.tensor(list(eos_ids), dtype=responses.dtype, device=responses.device)
    is_end = torch.isin(responses, ends)
    return is_end.cumsum(-1) - is_end.long() == 0

def token_loss(kind, student_logits, teacher_logits, tokens):  # [..., V] twice, [...] -> [...]
    """`reverse_kl`, `forward_kl`, or `sampled`: -A log p(y), A = log q(y) - log p(y) held constant.
    Over y ~ p, the expected gradient of `sampled` is that of `reverse_kl`. In nats."""
    if kind != "sampled":
        kl = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[kind]
        return kl(student_logits, teacher_logits)
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
    ids, head = torch.arange(3, device=device)[None], model.get_output_embeddings()
    projected, own = head(model.base_model(ids)[0]).float(), model(ids).logits.float()
    if not projected.equal(own):  # soft-capping, scaling
        fail(f"{flag} {path}: {model.config.model_type} models cap or scale their logits, which "
             "opd.py, projecting position by position, does not; choose another family")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return model, tokenizer, ends

def load_pair(student_path, teacher_path, temperature=1.0, device="cpu"):
    """Load both models and check that they can be compared token by token."""
    half = torch.bfloat16 if BF16 and device.startswith("cuda") else torch.float32
    student, tokenizer, ends = load_model("--student", student_path, torch.float32, device)
    teacher, other, teacher_ends = load_model("--teacher", teacher_path, half, device)
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = min(t for t in mine | theirs if mine.get(t) != theirs.get(t))
        fail(f"the tokenizers differ: {token!r} has id {mine.get(token)} for the student and "
             f"{theirs.get(token)} for the teacher; choose two models with one vocabulary")
    eos_ids = sorted(ends | teacher_ends)  # a base student may stop the way its chat teacher does
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens((eos_ids + [0])[0])
    student.generation_config = transformers.GenerationConfig(  # no top_k=20 of a checkpoint's own
        eos_token_id=eos_ids or None, pad_token_id=tokenizer.pad_token_id)
    # Qwen2.5 has 151,936 or 152,064 output rows for one tokenizer; the last are padding.
    width = min(len(m.get_output_embeddings().weight) for m in (student, teacher))
    return Pair(student, teacher.requires_grad_(False), tokenizer, eos_ids, width, temperature)

def read_prompts(path, pair, longest, room):  # -> [(prompt ids, reference ids)]
    """JSONL records. Of a prompt the last `longest` tokens count; `room` more must fit in."""
    tokenizer, examples = pair.tokenizer, []
    limit = min(getattr(m.config, "max_position_embeddings", None) or 10**9 for m in pair[:2])
    lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1)
    records = [(number, line) for number, line in lines if line.strip()]
    for number, line in tqdm(records, desc="reading prompts", disable=None):
        try:
            record = json.loads(line)
            chat = "messages" in record
            text = record["prompt"] if not chat else tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=True)
            # Never two BOS: a chat template writes its own, and a text may bring one.
            bos = not chat and not text.startswith(tokenizer.bos_token or "\0")
            prompt = tokenizer(text, add_special_tokens=bos).input_ids[-(longest or 10**9):]
            tail = tokenizer(record.get("reference", ""), add_special_tokens=False).input_ids
        except Exception as error:  # no JSON, no such key, no text, no chat template
            fail(f"{path}, line {number} needs `prompt` (text) or `messages` (chat): {error!r}")
        if not 0 < len(prompt) <= limit - room:
            fail(f"{path}, line {number}: {len(prompt)} tokens; a prompt needs 1 or more, and with "
                 f"{room} new ones at most {limit} (--max-prompt-tokens, --max-new-tokens)")
        examples.append((prompt, tail[:limit - len(prompt)]))
    return examples

# ---- Rollouts, and what the two models say about them.
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
    ends = torch.tensor(pair.eos_ids, dtype=ids.dtype, device=ids.device)
    return Rollout(ids, torch.cat([inputs.attention_mask, torch.ones_like(responses)], -1),
                   response_mask(responses, pair.eos_ids), torch.cat(logp, -1),
                   ~torch.isin(responses, ends).any(-1))

@autocast
def backbone(model, batch, size):  # -> [N, E]
    """The hidden states that predict the valid response tokens, `size` responses at a time. Logits
    are made of them in chunks: all at once, they would take 4 * B * R * V bytes several times."""
    states = []
    for part in split(batch, size):
        positions = (part.attention.cumsum(-1) - 1).clamp(min=0)  # GPT-2 must not count padding
        hidden = model.base_model(part.ids, attention_mask=part.attention, position_ids=positions,
                                  use_cache=False)[0]  # [B, P + R, E]
        states.append(hidden[:, -part.mask.shape[1] - 1:-1][part.mask])
    return torch.cat(states)

@autocast
def project(pair, model, hidden):  # [n, E] -> [n, V]
    """The logits that define p or q: float32, of the shared width, at the pair's temperature."""
    return model.get_output_embeddings()(hidden)[:, :pair.width].float() / pair.temperature

def chunks(pair, hidden, teacher_hidden, tokens):  # -> logits of p and q, [n, V] each, tokens [n]
    for h, t, y in zip(*(x.split(max(1, CHUNK // pair.width))
                         for x in (hidden, teacher_hidden, tokens))):
        yield project(pair, pair.student, h), project(pair, pair.teacher, t), y

def measure(pair, batch, size, function, graph=False):  # -> [N, ...] each, [N, E], [N, E']
    """function(student_logits, teacher_logits, tokens) -> tuple at all positions, in chunks, and
    the hidden states of the student (with their graph, if wanted) and the teacher."""
    with torch.set_grad_enabled(graph):
        hidden = backbone(pair.student, batch, size)
    with torch.no_grad():
        teacher_hidden = backbone(pair.teacher, batch, size)
        results = starmap(function, chunks(pair, hidden, teacher_hidden, tokens(batch)))
        return [torch.cat(result) for result in zip(*results)], hidden, teacher_hidden

def backward(pair, kind, hidden, teacher_hidden, tokens, divisor):  # [n, E], [n, E'], [n] -> float
    """Backpropagate sum(loss) / divisor and return it. The chain rule is cut at the hidden states,
    so that one chunk's logits are freed before the next chunk's are made."""
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for p, q, y in chunks(pair, leaf, teacher_hidden, tokens):
        loss = token_loss(kind, p, q, y).sum() / divisor
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
    for i in tqdm(range(0, len(examples), args.batch_size), desc="evaluating", disable=None):
        prompts, references = zip(*examples[i:i + args.batch_size])
        batch = rollout(pair, prompts, args.max_new_tokens)
        rows[0].append(measure(pair, batch, size, lambda p, q, y: (
            reverse_kl(p, q), forward_kl(p, q), entropy(p), p.argmax(-1) == q.argmax(-1)))[0])
        rows[1].append([batch.mask.sum(-1), batch.truncated])
        if any(references):  # these take the place of the responses
            ids, mask = pair.tokenizer.pad({"input_ids": references}, padding_side="right",
                                           return_tensors="pt").to(batch.ids.device).values()
            ids, attention = (torch.cat([x[:, :-batch.mask.shape[1]], y], -1)
                              for x, y in ((batch.ids, ids), (batch.attention, mask)))
            batch = batch._replace(ids=ids, attention=attention, mask=mask == 1)
            rows[2].append(measure(pair, batch, size, lambda p, q, y: (
                cross_entropy(p, y, reduction="none"), p.argmax(-1) == y))[0])
    means = [float(torch.cat(column).float().mean()) for part in rows for column in zip(*part)]
    return dict(zip(("reverse_kl", "forward_kl", "entropy", "agreement", "mean_length", "truncated",
                     "reference_nll", "reference_accuracy"), means))

# ---- Training: one pass of the loop is one step.
def train(pair, examples, args, out):
    """Train in place. Chance depends on seed and step alone: --resume continues bit for bit."""
    student, size, first = pair.student, args.micro_batch_size or args.batch_size, 0
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.1, fused=True)
    if args.resume:
        first, state = torch.load(Path(args.resume) / "state.pt", map_location="cpu")
        optimizer.load_state_dict(state)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    for step in tqdm(range(first, args.steps), desc="training", disable=None):
        started, seed = time.time(), args.seed * 1_000_003 + step
        torch.manual_seed(seed)
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        prompts = [examples[order[n % len(order)]][0] for n in numbers]
        batch = rollout(pair, prompts, args.max_new_tokens)  # 1. rollout
        rolled = time.time()
        values, hidden, teacher_hidden = measure(pair, batch, size, lambda p, q, y: (  # 2. score
            entropy(p), divergence(p, q, args.top_k), compatibility(p, q, args.top_k),
            reverse_kl(p, q), -cross_entropy(p, y, reduction="none")),
            graph=size >= args.batch_size)  # the update needs no second forward
        H, D, C = (torch.zeros_like(batch.mask, dtype=z.dtype).masked_scatter(batch.mask, z)
                   for z in values[:3])  # [B, R] each
        scores = position_scores(args.select, H, D, C, batch.mask, generator.manual_seed(seed))
        keep = select_positions(scores, batch.mask, 1 if args.select == "full" else args.budget)
        kept, valid, scored = int(keep.sum()), int(batch.mask.sum()), time.time()  # 3. select
        loss, rows = 0.0, keep[batch.mask]  # 4. update
        parts = split(batch._replace(mask=keep), size)
        targets = teacher_hidden[rows].split([int(part.mask.sum()) for part in parts])
        for part, target in zip(parts, targets):
            h = hidden[rows] if len(parts) == 1 else backbone(student, part, size)
            loss += backward(pair, args.loss, h, target, tokens(part), kept)  # by the batch's count
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        if not math.isfinite(loss + norm):
            fail(f"step {step}: loss {loss}, gradient norm {norm}; lower --lr. Saves are intact", 1)
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10)  # short warm-up
        optimizer.step()
        optimizer.zero_grad()
        values[4] = (values[4] - batch.logp[batch.mask]).abs()  # rounding, if all is well
        H, D, C, kl, gap, cut = (float(z.mean()) for z in (*values, batch.truncated.float()))
        line = {"step": step, "loss": loss, "kl_all": kl, "kept": kept, "valid": valid,
                "entropy": H, "divergence": D, "compatibility": C,
                "mean_length": valid / len(prompts), "truncated": cut, "lr": lr,
                "seconds": time.time() - started, "rollout_seconds": rolled - started,
                "score_seconds": scored - rolled, "padding": 1 - valid / keep.numel(),
                "sampling_gap": gap}
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in list(line.items())[:12]))
        if step % 20 == 0:
            sample = pair.tokenizer.batch_decode([prompts[0], tokens(split(batch, 1)[0])])
            tqdm.write("  sample: {!r} -> {!r}".format(*sample))
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

# ---- The embedded pair, the command line, the program.
PAIR = Path("runs/pair")
DEMO = {"student": f"{PAIR}/student", "teacher": f"{PAIR}/teacher", "steps": 100, "lr": 3e-4,
        "prompts": f"{PAIR}/prompts.jsonl", "batch_size": 24, "max_new_tokens": 40,
        "eval_prompts": 300}

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
    sizes = ("teacher", 4, 128, 600, 24), ("student", 2, 96, 300, 16)
    for name, layers, width, steps, rows in sizes:
        torch.manual_seed(layers)
        heads, eos = width // 32, tokenizer.eos_token_id
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=1024, hidden_size=width, intermediate_size=3 * width, head_dim=32,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=eos, pad_token_id=eos))
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
    with open(beside / "prompts.jsonl", "w") as file:
        for ids in sum(windows[:cut], []) + sum(windows[cut:], [])[:DEMO["eval_prompts"]]:
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
    losses = ("reverse_kl", "forward_kl", "sampled")
    add("--loss", choices=losses, default="reverse_kl", help="of a kept position, in nats")
    add("--temperature", type=float, default=1.0, help="of sampling, scoring and loss alike")
    add("--steps", type=int, default=200, help="optimizer steps (demo: 100)")
    add("--batch-size", type=int, default=8, help="responses per step (demo: 24)")
    add("--micro-batch-size", type=int, help="responses per forward pass (default: the batch)")
    add("--max-prompt-tokens", type=int, help="keep only so many last tokens of a prompt")
    add("--max-new-tokens", type=int, default=512, help="length limit of a response (demo: 40)")
    add("--lr", type=float, default=1e-6, help="after 10 steps of warm-up (demo: 3e-4)")
    add("--eval-prompts", type=int, default=64, help="last prompts, held out (demo: 300)")
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

def new_folder(out, stem):  # -> Path
    """--out, which must be new or empty, or the first free runs/stem-N."""
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
    summary = {"args": vars(args), "seconds": seconds, "before": before, "after": after,
               "versions": {m.__name__: m.__version__ for m in (torch, transformers)}}
    (out / "summary.json").write_text(json.dumps(summary))
    print(f"{'held-out prompts':20}{'before':>10}{'after':>10}")
    for name in before:
        print(f"{name:20}{before[name]:10.4f}{after[name]:10.4f}")
    print(f"{seconds:.0f} s; student/, log.jsonl and summary.json are in {out}")

def run(program):  # whatever stops it from outside gets one line, too
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
