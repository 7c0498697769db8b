"""Tests of opd.py and diagnose.py: offline, on the CPU, on tiny random models.

Expected values are brute-force loops in plain Python or numbers worked out by hand.
"""
import json, math, os, random, re, signal, subprocess, sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
import diagnose, opd

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
V = 64  # vocabulary of the tiny models

def softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [x / sum(powers) for x in powers]

def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))

def top(probabilities, k):
    return set(sorted(range(len(probabilities)), key=lambda v: -probabilities[v])[:k])

def restricted(probabilities, union):
    inside = [probabilities[v] for v in union]
    return [x / sum(inside) for x in inside]

def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale

def rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).double().tolist()

# ---- The mathematics

def test_entropy_and_both_kl_directions_agree_with_loops():
    s, t = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    found = opd.entropy(s), opd.forward_kl(s, t), opd.reverse_kl(s, t)
    for a, b, h, forward, reverse in zip(rows(s), rows(t), *(z.flatten() for z in found)):
        p, q = softmax(a), softmax(b)
        assert h == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)
        assert forward == pytest.approx(kl(q, p), abs=1e-5)
        assert reverse == pytest.approx(kl(p, q), abs=1e-5)
    assert {z.shape for z in found} == {(2, 3)}

@pytest.mark.parametrize("k", [1, 3, 5, 99])  # 99: more than there are
def test_divergence_and_compatibility_agree_with_loops_over_sets(k):
    s, t = logits(4, 5, 9), logits(4, 5, 9, seed=1)
    found = opd.divergence(s, t, k).flatten(), opd.compatibility(s, t, k).flatten()
    for a, b, d, c in zip(rows(s), rows(t), *found):
        p, q = softmax(a), softmax(b)
        union = top(p, k) | top(q, k)
        assert d == pytest.approx(kl(*(restricted(z, union) for z in (q, p))), abs=1e-5)
        assert c == pytest.approx(sum(q[v] for v in top(p, k)), abs=1e-5)

def test_union_counts_shared_ids_once():
    # Both top-2 sets are {0, 1}; on it p = (3/4, 1/4) and q = (1/4, 3/4): KL = 1/2 ln 3.
    p, q = torch.tensor([0.6, 0.2, 0.1, 0.1]), torch.tensor([0.2, 0.6, 0.1, 0.1])
    assert opd.divergence(p.log(), q.log(), 2) == pytest.approx(0.5 * math.log(3), abs=1e-6)

def test_divergence_uses_the_exact_student_probability_of_the_teachers_tokens():
    # K = 1: U = {0, 3}; on it p = (0.9, 0.1), q = (0.25, 0.75). With p(3) = 0, D were infinite.
    p, q = torch.tensor([0.72, 0.1, 0.1, 0.08]), torch.tensor([0.2, 0.1, 0.1, 0.6])
    expected = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1)
    assert opd.divergence(p.log(), q.log(), 1) == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("function", [opd.divergence, opd.compatibility])
@pytest.mark.parametrize("k", [0, -1])
def test_a_support_of_no_tokens_is_refused_instead_of_giving_zeros(function, k):
    with pytest.raises(ValueError, match="k must be"):
        function(logits(3, 6), logits(3, 6, seed=1), k)

def test_bf16_logits_are_cast_before_the_softmax():
    s = logits(50, 200).bfloat16()
    t = (s.float() + 0.05 * logits(50, 200, seed=1)).bfloat16()
    for f in (opd.forward_kl, opd.reverse_kl, lambda s, t: opd.divergence(s, t, 8)):
        exact = f(s.double().float(), t.double().float())
        assert torch.equal(f(s, t), exact) and f(s, t).dtype == torch.float32
        assert (exact > -1e-6).all()
    assert opd.entropy(s).dtype == opd.compatibility(s, t, 8).dtype == torch.float32

def test_extreme_logits_give_finite_values_and_gradients():
    s = torch.tensor([[80.0, -80.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-80.0, 80.0, 0.0, 0.0]])
    for loss in (opd.reverse_kl(s, t), opd.forward_kl(s, t), opd.divergence(s, t, 2)):
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        assert loss.isfinite().all() and gradient.isfinite().all()

def test_each_function_of_the_mathematics_runs_alone_when_pasted():
    source = (HERE / "opd.py").read_text()
    s, t = logits(3, 6), logits(3, 6, seed=1)
    mask = torch.ones(3, 6) > 0
    for name, arguments in {
            "entropy": (s,), "forward_kl": (s, t), "reverse_kl": (s, t), "divergence": (s, t, 2),
            "compatibility": (s, t, 2), "robust_normalize": (s, mask),
            "select_positions": (s, mask, 0.3),
            "response_mask": (torch.tensor([[5, 0, 7]]), [0])}.items():
        alone = {"torch": torch, "math": math, "numpy": np}  # the imports, and no other function
        exec(re.search(rf"^def {name}\(.*?(?=^def |^# ----|\Z)", source, re.M | re.S)[0], alone)
        assert torch.equal(alone[name](*arguments), getattr(opd, name)(*arguments))

def quantile(values, share):
    values, at = sorted(values), share * (len(values) - 1)
    below = int(at)
    return values[below] + (values[min(below + 1, len(values) - 1)] - values[below]) * (at - below)

def normalized(values, valid):
    low, high = quantile(valid, 0.05), quantile(valid, 0.95)
    return [min(max((z - low) / (high - low), 0.0), 1.0) for z in values]

def test_robust_normalize_interpolates_quantiles_of_valid_positions_only():
    # Valid 0 .. 20: Q05 = 1, Q95 = 19, so 10 becomes 1/2 and 4 becomes 1/6; the 1000 is padding.
    values = torch.cat([torch.arange(21.0), torch.tensor([1000.0])])[None]
    out = opd.robust_normalize(values, values < 100)[0]
    assert out[[0, 1, 19, 20, 21]].tolist() == [0, 0, 1, 1, 0]
    assert out[10] == pytest.approx(0.5) and out[4] == pytest.approx(1 / 6)

def test_robust_normalize_of_constant_single_and_no_values_is_zero():
    ones = torch.ones(2, 3)
    assert opd.robust_normalize(ones * 7, ones > 0).tolist() == [[0] * 3] * 2
    assert opd.robust_normalize(ones, torch.tensor([[True, False, False], [False] * 3])).sum() == 0
    assert opd.robust_normalize(ones, ones < 0).sum() == 0

def test_robust_normalize_takes_more_values_than_torch_quantile_does():
    values = torch.arange(16_777_217 + 1.0).flip(0)[None]
    out = opd.robust_normalize(values, values > -1)
    assert out.max() == 1 and out.min() == 0
    assert out[0, len(out[0]) // 2] == pytest.approx(0.5, abs=1e-3)

def grids(seed=0):
    generator = torch.Generator().manual_seed(seed)
    H, D, C = (torch.rand(4, 6, generator=generator) for _ in range(3))
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    return H, D, C, mask

def test_every_method_scores_as_its_row_of_the_table():
    H, D, C, mask = grids()
    h, d, c = (normalized(z[mask].tolist(), z[mask].tolist()) for z in (H, D, C))
    table = {
        "teachability": lambda h, d, c: d * c,
        "teachability_entropy": lambda h, d, c: h + d * c - h * d * c, "entropy": lambda h, d, c: h,
        "divergence": lambda h, d, c: d, "tip": lambda h, d, c: h + d - h * d,
        "compatibility": lambda h, d, c: c, "incompatible": lambda h, d, c: d * (1 - c),
        "full": lambda h, d, c: 0}
    assert set(table) | {"random"} == set(opd.METHODS)
    for method, formula in table.items():
        expected = [formula(*z) for z in zip(h, d, c)]
        assert opd.position_scores(method, H, D, C, mask)[mask].tolist() == pytest.approx(
            expected, abs=1e-5)

def test_soft_or_ties_exactly_where_entropy_is_saturated():
    H, D, C, mask = grids()
    H[:, 0] = 9.0  # beyond the 95 % quantile: normalised to 1, so D must make no difference
    for method in ("tip", "teachability_entropy"):
        assert opd.position_scores(method, H, D, C, mask)[:, 0].tolist() == [1.0] * 4

def test_random_scores_follow_their_generator_and_unknown_methods_are_refused():
    H, D, C, mask = grids()
    draw = lambda seed: opd.position_scores("random", H, D, C, mask,
                                            torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    with pytest.raises(ValueError, match="nonsense.*teachability"):
        opd.position_scores("nonsense", H, D, C, mask)

def brute_force_selection(scores, mask, budget):
    valid = [(r, t) for r, row in enumerate(mask) for t, ok in enumerate(row) if ok]
    ranked = sorted(valid, key=lambda at: -scores[at[0]][at[1]])  # stable: ties stay in order
    n = len(valid)
    keep = set(ranked[:next(m for m in range(n + 1) if m >= budget * n - 1e-9)])
    for r in range(len(mask)):
        own = [at for at in ranked if at[0] == r]
        if own and not keep & set(own):
            keep.add(own[0])
    return keep

def test_selection_agrees_with_brute_force_also_with_ties_and_empty_rows():
    for seed in range(60):
        dice = random.Random(seed)
        B, R = dice.randint(1, 5), dice.randint(1, 8)
        scores = [[dice.randint(0, 3) / 3 for _ in range(R)] for _ in range(B)]
        mask = [[t < n for t in range(R)] for n in (dice.randint(0, R) for _ in range(B))]
        budget = dice.choice([0.03, 0.1, 0.29, 0.5, 1])
        keep = opd.select_positions(torch.tensor(scores), torch.tensor(mask), budget)
        found = set(map(tuple, keep.nonzero().tolist()))
        assert found == brute_force_selection(scores, mask, budget)

def test_budget_counts_are_free_of_float_noise():
    scores, mask = torch.rand(1, 100), torch.ones(1, 100) > 0
    for budget, expected in ((0.07, 7), (0.29, 29), (0.055, 6), (1e-9, 1), (1, 100)):
        # 0.07 * 100 > 7 in floats
        assert opd.select_positions(scores, mask, budget).sum() == expected

@pytest.mark.parametrize("budget", [0, -0.1, 1.0001, math.nan])
def test_a_budget_outside_its_range_is_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        opd.select_positions(torch.rand(2, 2), torch.ones(2, 2) > 0, budget)

def test_response_mask_ends_with_the_first_eos_of_several_even_if_pad_is_eos():
    responses = torch.tensor([[5, 6, 2, 2, 2], [9, 5, 2, 5, 5], [5, 5, 5, 5, 5], [2, 5, 9, 5, 5]])
    assert opd.response_mask(responses, [2, 9]).sum(1).tolist() == [3, 1, 5, 1]
    assert opd.response_mask(responses, []).all()

# ---- The losses

def test_identical_models_have_no_loss_and_no_gradient():
    s = logits(5, 11).requires_grad_()
    for kind in ("reverse_kl", "forward_kl", "sampled"):
        loss = opd.token_loss(kind, s, s.detach().clone(), torch.arange(5))
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        assert loss.abs().max() == 0 and gradient.abs().max() < 1e-6

def test_expected_sampled_gradient_is_the_reverse_kl_gradient():
    s, t = logits(6).double().requires_grad_(), logits(6, seed=1)
    expected = torch.zeros(6)
    for y, probability in enumerate(softmax(s.tolist())):
        loss = opd.token_loss("sampled", s[None].float(), t[None], torch.tensor([y]))
        expected += probability * torch.autograd.grad(loss.sum(), s)[0].float()
    (exact,) = torch.autograd.grad(opd.reverse_kl(s.float(), t), s)
    assert torch.allclose(expected, exact.float(), atol=1e-5) and exact.abs().max() > 0.1

def test_reverse_kl_gradient_is_the_formula_of_the_readme():
    s, t = logits(7).requires_grad_(), logits(7, seed=1)
    p, q = softmax(s.tolist()), softmax(t.tolist())
    (gradient,) = torch.autograd.grad(opd.reverse_kl(s, t), s)
    expected = [x * (math.log(x / y) - kl(p, q)) for x, y in zip(p, q)]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-5)

def test_a_token_without_student_mass_gets_gradient_from_forward_kl_only():
    s, t = torch.tensor([4.0, 3.0, -20.0], requires_grad=True), torch.tensor([0.0, 0.0, 6.0])
    (reverse,) = torch.autograd.grad(opd.reverse_kl(s, t), s)
    (forward,) = torch.autograd.grad(opd.forward_kl(s, t), s)
    assert abs(reverse[2]) < 1e-6 and forward[2] < -0.9

# ---- Tiny models of three families

def tokenizer_of(size=V, **special):
    words = {"<eos>": 0, "<s>": 1, "<end>": 2, **{f"w{i}": i for i in range(3, size)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"eos_token": "<eos>", "pad_token": "<eos>", **special})

def model_of(family, seed=0, vocab=V, width=16, scale=3.0, **more):
    torch.manual_seed(seed)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocab, n_embd=width, n_layer=2, n_head=2,
                                         n_positions=64, eos_token_id=0, bos_token_id=None, **more)
    else:
        name = {"qwen3": "Qwen3", "llama": "Llama", "gemma2": "Gemma2"}[family]
        config = getattr(transformers, f"{name}Config")(
            vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
            head_dim=8, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            eos_token_id=0, bos_token_id=None, pad_token_id=0, tie_word_embeddings=True, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.mul_(scale)  # otherwise every distribution is flat
    return model

def put(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)

def uneven_pair(folder):
    """Two models far apart, whose responses end after different numbers of tokens."""
    pair = [model_of("qwen3", seed, scale=12.0).eval() for seed in (0, 1)]
    for role, model in zip(("student", "teacher"), pair):
        model.generation_config.eos_token_id = list(range(12))
        put(folder / role, model)
    return pair

def prompts_file(path, count=12, **more):
    dice = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            words = " ".join(f"w{dice.randint(3, V - 1)}" for _ in range(1 + i % 5))
            file.write(json.dumps({"prompt": words, "answer": f"w{3 + i}", **more}) + "\n")
    return str(path)

@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama", "gpt2"):
        put(folder / f"{family}-student", model_of(family, seed=1))
        put(folder / f"{family}-teacher",
            model_of(family, seed=2, width=24 if family == "gpt2" else 16))
    prompts_file(folder / "prompts.jsonl")
    return folder

def flags(store, out, *more, family="qwen3"):
    pair = ["--student", f"{store}/{family}-student", "--teacher", f"{store}/{family}-teacher"]
    sizes = "--steps 3 --batch-size 4 --max-new-tokens 6 --lr 1e-3 --eval-prompts 4 --device cpu"
    return [*pair, "--prompts", f"{store}/prompts.jsonl", *sizes.split(), "--out", str(out),
            *map(str, more)]

@pytest.fixture
def run(store, tmp_path):
    """The program with these flags, into tmp_path / name -> its log."""
    def main(name, *more, family="qwen3"):
        opd.main(opd.parse_args(flags(store, tmp_path / name, *more, family=family)))
        return [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
    return main

def summary_of(out):
    return json.loads((out / "summary.json").read_text())

def weights_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.state_dict()

def load_weights(folder):
    return torch.cat([w.flatten() for w in weights_of(folder).values()])

def same_weights(a, b):
    return torch.equal(load_weights(a), load_weights(b))

@contextmanager
def one_line(capsys, says, status=2):
    """What stands inside must stop the program with this status and one clear line at the end."""
    with pytest.raises(SystemExit) as stop:
        yield
    error = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in error
    assert error.startswith("error: ") or error.count("\nerror: ") == 1
    assert re.search(says, error.strip().splitlines()[-1])

def finite(log):
    return all(math.isfinite(value) for line in log for value in line.values())

def timeless(log):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in log]

def load(store, family="qwen3", **more):
    return opd.load_pair(f"{store}/{family}-student", f"{store}/{family}-teacher", **more)

PROMPTS = [[5, 6, 7, 8, 9], [5], [10, 11, 12]]

def draw(pair, prompts=PROMPTS, length=6):
    torch.manual_seed(0)
    return opd.rollout(pair, prompts, length)

def own_logits(pair, prompt, response):
    """Those of student and teacher that predict the response: whole models, alone, no padding."""
    ids = torch.tensor([prompt + response])
    return [model(ids).logits[0, len(prompt) - 1:-1] for model in pair[:2]]

def one_by_one(pair, prompts, batch):  # -> student's logits, teacher's, response: one at a time
    for row, mask, prompt in zip(batch.ids, batch.mask, prompts):
        response = row[-len(mask):][mask].tolist()
        yield *own_logits(pair, prompt, response), response

@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_chunked_projection_gives_the_models_own_logits_and_left_padding_changes_nothing(
        store, family, monkeypatch):
    pair = load(store, family)
    batch = draw(pair)
    monkeypatch.setattr(opd, "CHUNK", 3 * V)  # three positions a chunk
    measured = opd.measure(pair, batch, 2, lambda p, q, y: (p, q, y))
    p, q, response = zip(*one_by_one(pair, PROMPTS, batch))
    for ours, own in zip(measured, (torch.cat(p), torch.cat(q), torch.tensor(sum(response, [])))):
        assert torch.allclose(ours, own, atol=1e-4)

def test_a_family_that_caps_its_logits_is_refused(tmp_path, capsys):
    path = put(tmp_path / "gemma", model_of("gemma2", scale=30.0, final_logit_softcapping=5.0))
    with one_line(capsys, "gemma2"):
        opd.load_pair(path, path)

def gradient(pair, batch, keep, size, kind="reverse_kl"):
    """What one update hands to its optimizer, with the clipping undone."""
    args = SimpleNamespace(loss=kind, micro_batch_size=size, top_k=4)
    idle = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    pair.student.zero_grad()
    _, hidden = opd.score(pair, batch, args)
    _, norm = opd.update(pair, idle, batch, hidden, keep, args)
    flat = torch.cat([w.grad.flatten() for w in pair.student.parameters()])
    return flat * max(1.0, norm + 1e-6)

@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradient_is_that_of_the_mean_over_kept_positions_through_the_whole_model(
        store, family, monkeypatch):
    pair = load(store, family)
    batch = draw(pair)
    keep = batch.mask & (torch.arange(batch.mask.shape[1]) % 2 == 0)
    monkeypatch.setattr(opd, "CHUNK", 2 * V)
    ours = gradient(pair, batch, keep, 3)
    pair.student.zero_grad()
    losses = []
    for (p, q, response), kept in zip(one_by_one(pair, PROMPTS, batch), keep):
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        losses += [(p[t].exp() * (p[t] - q[t])).sum() for t in range(len(response)) if kept[t]]
    (sum(losses) / len(losses)).backward()
    expected = torch.cat([w.grad.flatten() for w in pair.student.parameters()])
    assert torch.allclose(ours, expected, atol=1e-5) and expected.abs().max() > 1e-3
    assert all(w.grad is None for w in pair.teacher.parameters())

def test_gradient_does_not_depend_on_the_micro_batches(store):
    pair = load(store)
    batch = draw(pair)
    keep = opd.select_positions(torch.rand(batch.mask.shape), batch.mask, 0.4)
    whole = gradient(pair, batch, keep, 3)
    for size in (1, 2):
        assert torch.allclose(gradient(pair, batch, keep, size), whole, atol=1e-6)

# ---- Rollouts

def test_sampling_reaches_beyond_every_filter_of_the_checkpoint(tmp_path):
    model = model_of("qwen3", vocab=300, scale=5.0)  # nearly uniform, without ties
    model.generation_config.update(top_k=2, top_p=0.1, min_p=0.8, do_sample=True)
    path = put(tmp_path / "model", model, tokenizer_of(300))
    pair = opd.load_pair(path, path)
    batch = draw(pair, [[5]] * 3000, 1)
    drawn = torch.bincount(opd.tokens(batch), minlength=300)
    assert (drawn > 0).sum() > 290  # about ten draws a token

def test_one_temperature_governs_sampling_and_scoring(tmp_path):
    path = put(tmp_path / "model", model_of("qwen3", scale=20.0))
    pair = opd.load_pair(path, path, temperature=0.25)
    batch = draw(pair, [[5]] * 4000, 1)
    expected = torch.softmax(4 * next(one_by_one(pair, [[5]], batch))[0][0], -1)
    for scored in opd.measure(pair, opd.split(batch, 1)[0], 1, lambda p, q, y: (p, q)):
        assert torch.allclose(scored[0].softmax(-1), expected, atol=1e-5)
    drawn = torch.bincount(batch.ids[:, 1], minlength=V) / 4000
    assert (drawn - expected).abs().max() < 0.04 and expected.max() > 0.1

def test_the_log_probability_of_each_draw_is_that_of_the_scored_distribution(tmp_path):
    student = put(tmp_path / "wide", model_of("gpt2", vocab=V + 9))
    pair = opd.load_pair(student, put(tmp_path / "t", model_of("qwen3")), temperature=0.7)
    batch = draw(pair)
    assert batch.logp.shape == batch.mask.shape
    for (own, _, response), drawn in zip(one_by_one(pair, PROMPTS, batch), batch.logp):
        for row, y, logp in zip(rows(own[:, :V] / 0.7), response, drawn):
            assert logp == pytest.approx(math.log(softmax(row)[y]), abs=1e-4)

def test_the_log_tells_how_far_sampling_and_scoring_are_apart(run, monkeypatch):
    more = ["--temperature", 0.8]
    assert all(line["sampling_gap"] < 1e-5 for line in run("a", *more))
    real = opd.rollout
    def elsewhere(*args):  # as if every token had been drawn with a quarter nat more
        batch = real(*args)
        return batch._replace(logp=batch.logp + 0.25)
    monkeypatch.setattr(opd, "rollout", elsewhere)
    for line in run("b", *more):
        assert line["sampling_gap"] == pytest.approx(0.25, abs=1e-4)

@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_under_bf16_autocast_the_update_is_that_of_float32_but_for_rounding(store, family):
    pair = load(store, family)
    batch = draw(pair)
    exact = gradient(pair, batch, batch.mask, 3)
    with torch.autocast("cpu", torch.bfloat16):  # what opd.autocast does on a GPU
        assert (draw(pair).logp - batch.logp)[:, 0].abs().max() < 0.1
        p, kl = opd.measure(pair, batch, 3, lambda p, q, y: (p, opd.reverse_kl(p, q)))
        rounded = gradient(pair, batch, batch.mask, 3)
    assert p.dtype == torch.float32 and (kl > 0).all()
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.99

def test_sampled_ids_are_the_scored_ids_and_never_pass_through_text(store, monkeypatch):
    pair = load(store)
    monkeypatch.setattr(type(pair.tokenizer), "decode", None)
    batch = draw(pair, PROMPTS, 4)
    assert batch.ids[0, :5].tolist() == PROMPTS[0] and batch.ids[1, 4] == 5
    assert batch.attention[:, :5].sum(1).tolist() == [5, 1, 3]

def test_padding_rows_of_a_wider_model_are_cut_and_never_sampled(tmp_path):
    narrow = put(tmp_path / "narrow", model_of("qwen3"))
    wide = put(tmp_path / "wide", model_of("qwen3", seed=1, vocab=V + 40, scale=0.0))
    for student, teacher in ((narrow, wide), (wide, narrow)):
        pair = opd.load_pair(student, teacher)
        batch = draw(pair, [[5]] * 40, 10)
        p, q = opd.measure(pair, batch, 40, lambda p, q, y: (p, q))
        assert pair.width == V == p.shape[-1] == q.shape[-1] and batch.ids.max() < V

def test_padding_rows_beyond_the_tokenizer_may_be_sampled(run, tmp_path):
    paths = [put(tmp_path / name, model_of("qwen3", seed, vocab=2 * V, scale=0.0))
             for name, seed in (("s", 1), ("t", 2))]
    assert finite(run("out", "--student", paths[0], "--teacher", paths[1]))

def test_base_student_stops_at_its_chat_teachers_eos_too(tmp_path):
    student, teacher = model_of("qwen3", scale=0.0), model_of("qwen3", seed=1)
    teacher.generation_config.eos_token_id = [2, 0]
    pair = opd.load_pair(put(tmp_path / "s", student), put(tmp_path / "t", teacher))
    assert pair.eos_ids == [0, 2] and pair.student.generation_config.eos_token_id == [0, 2]
    batch = draw(pair, [[5]] * 200, 30)
    responses = batch.ids[:, 1:]
    teachers_end = (responses == 2) & batch.mask
    assert teachers_end.any() and not responses[:, 1:][teachers_end[:, :-1]].any()
    ended = torch.isin(responses, torch.tensor([0, 2])).any(1)
    assert torch.equal(batch.truncated, ~ended) and ended.any() and not ended.all()

def test_missing_pad_token_is_filled_in(tmp_path):
    tokenizer = tokenizer_of(pad_token=None)
    path = put(tmp_path / "m", model_of("llama"), tokenizer)
    pair = opd.load_pair(path, path)
    assert opd.rollout(pair, PROMPTS, 3).ids.shape[0] == 3
    no_eos = model_of("llama")
    no_eos.config.eos_token_id = no_eos.generation_config.eos_token_id = None
    path = put(tmp_path / "n", no_eos, tokenizer_of(pad_token=None, eos_token=None))
    pair = opd.load_pair(path, path)
    assert pair.eos_ids == [] and opd.rollout(pair, PROMPTS, 3).truncated.all()

# ---- Prompts

def read(tmp_path, pair, *records, longest=None, room=6):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return opd.read_prompts(path, pair, longest, room)

def test_bos_is_added_once_whoever_brings_it(store, tmp_path):
    tokenizer = tokenizer_of(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}<end>"
    pair = load(store)._replace(tokenizer=tokenizer)
    examples = read(tmp_path, pair, {"prompt": "w5 w6", "answer": "w7"}, {"prompt": "<s> w5 w6"},
                    {"messages": [{"role": "user", "content": "w5 w6"}]})
    assert examples == [([1, 5, 6], "w7"), ([1, 5, 6], None), ([1, 5, 6, 2], None)]

def test_long_prompts_keep_their_last_tokens(store, tmp_path):
    assert read(tmp_path, load(store), {"prompt": "w3 w4 w5 w6"}, longest=2) == [([5, 6], None)]

@pytest.mark.parametrize("response,answer,right", [
    ("First 7, then 9.", "9", True), ("9 or 10", "9", False), ("no number at all", "9", False),
    ("So it makes 1,234.", "1234", True), ("1234", "about 1,234.", True), ("12,34", "1234", False),
    (r"\boxed{42}", "The answer is 42.", True), ("0.50 litres", "0.5", True), ("", "9", False),
    ("from 5 to -3", "-3", True), ("from 5 to 3", "-3", False), ("5-3", "3", True),
    ("It is Paris.", "Paris", True), ("Paris is large", "Paris", False), ("", "Paris", False)])
def test_an_answer_is_right_if_its_last_number_is_the_responses_last(response, answer, right):
    assert opd.is_right(response, answer) is right

# ---- The program

@pytest.mark.parametrize("family,loss,method", [
    ("qwen3", "reverse_kl", "teachability"), ("llama", "sampled", "tip"),
    ("gpt2", "forward_kl", "random")])
def test_a_real_run_leaves_a_student_a_log_and_a_summary(
        run, store, tmp_path, family, loss, method, capsys):
    log = run("out", "--loss", loss, "--select", method, family=family)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert finite(log)
    assert all(line["kept"] >= math.ceil(0.1 * line["valid"]) for line in log)
    summary = summary_of(tmp_path / "out")
    assert set(summary) == {"args", "versions", "seconds", "before", "after"}
    for when in ("before", "after"):
        assert list(summary[when])[:2] == ["accuracy", "reverse_kl"]
        assert all(math.isfinite(value) for value in summary[when].values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    assert tokenizer("w5").input_ids == [5]
    assert not same_weights(store / f"{family}-student", tmp_path / "out" / "student")
    out = capsys.readouterr().out
    assert re.search(r"^accuracy +0\.", out, re.M) and len(out.splitlines()) < 20

@pytest.mark.parametrize("steps,apart", [(5, 1), (21, 2)])
def test_the_terminal_shows_each_tenth_of_the_run_and_the_log_every_step(run, capsys, steps, apart):
    log = run("out", "--steps", steps)
    heading, *shown = re.findall(r"^ +(?:step|\d+)  .*", capsys.readouterr().out, re.M)
    assert heading.split()[:3] == ["step", "loss", "kl_all"] and len(log) == steps
    assert [int(line.split()[0]) for line in shown] == list(range(0, steps, apart))
    for line in shown:
        step, *found = map(float, line.split()[:3])
        expected = [log[int(step)][key] for key in ("loss", "kl_all")]
        assert found == pytest.approx(expected, rel=1e-3)
        assert len(line) == len(heading)

def test_evaluation_agrees_with_loops_over_the_whole_model(store, capsys):
    pair = load(store)
    args = opd.parse_args(flags(store, "unused", "--batch-size", 3))
    prompts = [[5, 6], [10], [11, 12, 13]]
    batch = draw(pair, prompts)
    texts = [pair.tokenizer.decode(opd.tokens(one)) for one in opd.split(batch, 1)]
    answers = [texts[0].removesuffix(" <eos>"), None, texts[2] + "9"]  # right, not asked, wrong
    measured = opd.evaluate(pair, list(zip(prompts, answers)), args)
    values = []
    for p, q, _ in one_by_one(pair, prompts, batch):
        for x, y in zip(map(softmax, rows(p)), map(softmax, rows(q))):
            entropy = -sum(a * math.log(a) for a in x)
            values.append((kl(x, y), kl(y, x), entropy, top(x, 1) == top(y, 1)))
    means = [sum(column) / len(values) for column in zip(*values)]
    names = ["reverse_kl", "forward_kl", "entropy", "agreement"]
    assert [measured[name] for name in names] == pytest.approx(means, abs=1e-4)
    assert measured["accuracy"] == 0.5 and measured["mean_length"] == len(values) / 3
    assert measured["truncated"] == sum(0 not in batch.ids[b, 3:] for b in range(3)) / 3
    assert repr(texts[0].removesuffix(" <eos>")) in capsys.readouterr().out  # the printed sample

def test_without_answers_there_is_no_accuracy(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5 w6"}\n' * 10)
    run("out", "--prompts", tmp_path / "p.jsonl")
    summary = summary_of(tmp_path / "out")
    assert "accuracy" not in summary["after"] and "reverse_kl" in summary["after"]

def test_same_seed_same_log_and_other_seed_other_log(run, tmp_path):
    a, b, c = (timeless(run(name, "--seed", seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert same_weights(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert a == b and a != c

def test_the_seed_changes_the_samples_and_not_only_the_order_of_the_prompts(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5 w6"}\n' * 12)
    a, b = (run(seed, "--seed", seed, "--prompts", tmp_path / "p.jsonl") for seed in "34")
    assert a[0]["kl_all"] != b[0]["kl_all"]

def test_budget_one_is_full_opd_bit_for_bit(run, tmp_path):
    full = timeless(run("full", "--select", "full"))
    for method in ("divergence", "random"):
        assert timeless(run(method, "--select", method, "--budget", 1)) == full
        assert same_weights(tmp_path / "full" / "student", tmp_path / method / "student")
    assert full[0]["kept"] == full[0]["valid"]

def test_full_distillation_brings_the_student_closer(run, tmp_path):
    run("out", "--select", "full", "--steps", 40, "--lr", 1e-2, "--batch-size", 8)
    summary = summary_of(tmp_path / "out")
    assert summary["after"]["reverse_kl"] < 0.7 * summary["before"]["reverse_kl"]

def test_a_bf16_checkpoint_moves_at_a_learning_rate_of_1e_6(run, tmp_path):
    model = model_of("qwen3", seed=1).bfloat16()
    path = put(tmp_path / "bf16", model)
    more = ["--student", path, "--lr", "1e-6", "--steps", 20, "--select", "full"]
    run("out", *more)
    before, after = model.state_dict(), weights_of(tmp_path / "out" / "student")
    moved = sum(int((after[name] != before[name].float()).sum()) for name in after)
    assert moved > 0.9 * sum(w.numel() for w in after.values())

def test_the_first_step_is_that_of_adamw_at_a_tenth_of_the_learning_rate(run, store, tmp_path):
    run("out", "--lr", 1, "--steps", 1, "--select", "full")
    before, after = weights_of(store / "qwen3-student"), weights_of(tmp_path / "out" / "student")
    lr = 0.1  # after one step Adam's two moments cancel: every weight moves by lr, after the decay
    moved = torch.cat([(after[n] - w * (1 - lr * 0.1)).abs().flatten() for n, w in before.items()])
    assert (moved - lr).abs().median() < 5e-5 and (moved < lr + 1e-5).all()

@pytest.mark.parametrize(
    "more", [["--max-new-tokens", 1], ["--top-k", 500], ["--budget", "1e-9"], ["--batch-size", 1]])
def test_degenerate_settings_run_without_nan(run, more):
    assert finite(run("out", *more))

def test_responses_of_one_token_and_responses_that_never_end_are_no_problem(run, tmp_path):
    for name, ends, length in (("stops", list(range(V)), 1), ("never", None, 6)):
        model = model_of("qwen3", seed=1)
        model.config.eos_token_id = model.generation_config.eos_token_id = ends
        tokenizer = tokenizer_of(eos_token="<eos>" if ends else None)
        paths = [put(tmp_path / f"{name}-{role}", model, tokenizer)
                 for role in ("student", "teacher")]
        log = run(f"{name}-out", "--student", paths[0], "--teacher", paths[1])
        assert all(z["mean_length"] == length and z["truncated"] == (not ends) for z in log)
        assert finite(log)

# ---- The whole: a plain reimplementation, and which prompts go where

def recorded_rollouts(monkeypatch):
    real, calls = opd.rollout, []
    def rollout(pair, prompts, length):
        calls.append((prompts, real(pair, prompts, length)))
        return calls[-1][1]
    monkeypatch.setattr(opd, "rollout", rollout)
    return calls

def plain_step(student, teacher, prompts, batch, temperature, k, budget):
    """Scores by loops over the whole vocabulary, one response at a time -> what the log must say,
    and the gradient of the mean loss."""
    found, losses = [], {}
    for b, (p, q, response) in enumerate(one_by_one((student, teacher), prompts, batch)):
        p, q = p / temperature, q / temperature
        for t in range(len(response)):
            x, y = softmax(p[t].tolist()), softmax(q[t].tolist())
            union = top(x, k) | top(y, k)
            found.append({
                "at": (b, t), "entropy": -sum(u * math.log(u) for u in x), "kl_all": kl(x, y),
                "divergence": kl(restricted(y, union), restricted(x, union)),
                "compatibility": sum(y[v] for v in top(x, k))})
            logp, logq = p[t].log_softmax(0), q[t].log_softmax(0)
            losses[b, t] = (logp.exp() * (logp - logq)).sum()
    d, c = ([z[key] for z in found] for key in ("divergence", "compatibility"))
    score = [x * y for x, y in zip(normalized(d, d), normalized(c, c))]
    grid = torch.zeros(batch.mask.shape).tolist()
    for z, value in zip(found, score):
        grid[z["at"][0]][z["at"][1]] = value
    keep = brute_force_selection(grid, batch.mask.tolist(), budget)
    loss = sum(losses[at] for at in keep) / len(keep)
    expected = {"loss": loss.item(), "kept": len(keep), "valid": len(found)}
    for key in ("entropy", "divergence", "compatibility", "kl_all"):
        expected[key] = sum(z[key] for z in found) / len(found)
    return expected, torch.autograd.grad(loss, list(student.parameters()))

def test_two_whole_steps_are_those_of_a_plain_reimplementation(run, tmp_path, monkeypatch):
    calls = recorded_rollouts(monkeypatch)
    more = ["--temperature", 0.7, "--budget", 0.3, "--top-k", 3, "--micro-batch-size", 2,
            "--student", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    student, teacher = uneven_pair(tmp_path)
    log = run("out", *more, "--steps", 2, "--lr", 1e-2)
    weights = list(student.parameters())
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step, (prompts, batch) in enumerate(calls[1:3]):  # between the two evaluations
        assert len(set(batch.mask.sum(1).tolist())) > 1  # different lengths
        expected, gradient = plain_step(student, teacher, prompts, batch, 0.7, 3, 0.3)
        assert {key: log[step][key] for key in expected} == pytest.approx(expected, abs=1e-4)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
        assert norm > 1.05 and log[step]["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        lr = 1e-2 * (step + 1) / 10
        with torch.no_grad():
            for w, g, (m, v) in zip(weights, gradient, moments):
                g = g / norm  # clipped to 1
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                first, second = m / (1 - 0.9**(step + 1)), v / (1 - 0.999**(step + 1))
                w -= lr * 0.1 * w + lr * first / (second.sqrt() + 1e-8)
    after = weights_of(tmp_path / "out" / "student")
    for name, w in student.state_dict().items():
        wrong = (after[name] - w).abs() > 2e-5  # Adam blows up the rounding of gradients near 0
        assert wrong.float().mean() < 0.02, name

def test_held_out_prompts_are_evaluated_and_all_others_trained_in_turn(run, tmp_path, monkeypatch):
    calls = recorded_rollouts(monkeypatch)
    lines = [json.dumps({"prompt": f"w{3 + i}"}) + "\n" for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    before, *steps, after = ([ids for (ids,) in prompts] for prompts, _ in calls)
    assert before == after == [11, 12, 13, 14]
    assert sorted(steps[0] + steps[1]) == list(range(3, 11)) and steps[2] == steps[0]
    assert steps[0] + steps[1] != list(range(3, 11))  # shuffled

# ---- Interruptions

def test_a_resumed_run_continues_bit_for_bit(run, tmp_path):
    whole = run("whole", "--steps", 5, "--save-every", 2)
    rest = run("rest", "--steps", 5, "--resume", tmp_path / "whole" / "step-2")
    assert timeless(rest) == timeless(whole[2:])
    assert same_weights(tmp_path / "whole" / "student", tmp_path / "rest" / "student")
    without = run("other", "--steps", 5, "--student", tmp_path / "whole" / "step-2")
    assert timeless(without)[:3] != timeless(rest)

KILL = """
import os, signal, sys, opd
real, calls = opd.torch.save, []
def save(state, path):
    calls.append(path)
    if len(calls) == 2:  # in the middle of the second save
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, path)
opd.torch.save = save
opd.run(lambda: opd.main(opd.parse_args(sys.argv[1:])))
"""

def python(code, *args, **more):
    return subprocess.run([sys.executable, "-c", code, *args], cwd=HERE, capture_output=True,
                          text=True, timeout=100, **more)

def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_save_whole(run, store, tmp_path):
    every = flags(store, tmp_path / "out", "--save-every", 1)
    assert python(KILL, *every).returncode == -signal.SIGKILL
    saves = [path.name for path in (tmp_path / "out").glob("step-*")]
    assert sorted(saves) == ["step-1", "step-2.partial"]
    rest = run("rest", "--resume", tmp_path / "out" / "step-1")
    assert [line["step"] for line in rest] == [1, 2]
    assert not (tmp_path / "rest" / "student" / "state.pt").exists()

def test_a_full_disk_gives_one_line_and_keeps_the_earlier_save(store, tmp_path):
    code = KILL.replace("os.kill(os.getpid(), signal.SIGKILL)",
                        "raise OSError(28, 'No space left on device')")
    result = python(code, *flags(store, tmp_path / "out", "--save-every", 1))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search("\nerror: .*No space left.*\n$", "\n" + result.stderr)
    assert weights_of(tmp_path / "out" / "step-1") and not (tmp_path / "out" / "step-2").exists()

def test_ctrl_c_saves_the_student_says_where_and_exits_with_130(
        run, store, tmp_path, monkeypatch, capsys):
    real, calls = opd.rollout, []
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # one batch of evaluation, then two steps
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(opd, "rollout", interrupted)
    with one_line(capsys, str(tmp_path / "out" / "student"), status=130):
        run("out")
    assert not same_weights(store / "qwen3-student", tmp_path / "out" / "student")

def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_saves(run, tmp_path, capsys):
    with one_line(capsys, r"step \d+: loss.*--lr", status=1):
        run("out", "--lr", "1e9", "--steps", 30, "--save-every", 1)
    assert weights_of(tmp_path / "out" / "step-1")

def test_a_second_run_never_touches_the_first(run, store, tmp_path, capsys, monkeypatch):
    run("out")
    before = load_weights(tmp_path / "out" / "student")
    with one_line(capsys, "--out"):
        run("out", "--seed", 9)
    assert torch.equal(before, load_weights(tmp_path / "out" / "student"))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        arguments = flags(store, "x")
        at = arguments.index("--out")
        opd.main(opd.parse_args(arguments[:at] + arguments[at + 2:]))
    assert (tmp_path / "runs/opd-1/student").exists() and (tmp_path / "runs/opd-2/student").exists()

# ---- Bad input

@pytest.mark.parametrize("more", [
    "--budget 0", "--budget 1.5", "--budget nan", "--top-k 0", "--temperature 0",
    "--temperature inf", "--select best", "--steps 0", "--lr -1", "--batch-size x", "--seed -3",
    "--frobnicate"])
def test_a_bad_flag_gets_one_line_that_names_it(store, tmp_path, capsys, more):
    with one_line(capsys, f"^error: .*{more.split()[0]}"):
        opd.parse_args(flags(store, tmp_path / "out", *more.split()))

def test_half_a_pair_is_refused(capsys):
    with one_line(capsys, "--teacher"):
        opd.parse_args(["--student", "x"])

@pytest.mark.parametrize("content,says", [
    ("", "0 prompts"), ('{"prompt": "w5"}\nnot json\n', "line 2"), ("[1]\n", "line 1"),
    ('{"text": "w5"}\n', "line 1"), ('{"prompt": 5}\n', "line 1"),
    ('{"prompt": "w5"}\n{"prompt": ""}\n', "line 2"), ('{"prompt": "w5"}\n' * 7, "7 prompts"),
    (json.dumps({"prompt": "w5 " * 60}) + "\n", "60 tokens"), (b"\xff\xfe", "utf-8"),
    ('{"messages": [{"role": "user", "content": "w5"}]}\n', "chat"),
    ('{"prompt": "w5", "answer": 7}\n', "line 1"),
    ('{"prompt": "w5", "answer": " "}\n', "empty answer")])
def test_bad_prompts_get_one_line_with_the_place_and_leave_nothing(
        run, tmp_path, content, says, capsys):
    (tmp_path / "p.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line(capsys, says):
        opd.run(lambda: run("out", "--prompts", tmp_path / "p.jsonl"))
    assert not (tmp_path / "out").exists()

def test_missing_paths_get_one_line_that_names_them(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for flag, path in (("--student", tmp_path / "none"), ("--prompts", "none.jsonl"),
                       ("--out", tmp_path / "file" / "out"), ("--device", "abacus"),
                       ("--device", "cuda:99"), ("--resume", tmp_path / "none")):
        with one_line(capsys, str(path)):
            opd.run(lambda: run("out", flag, path))

def test_different_tokenizers_are_refused_with_a_token_that_differs(store, tmp_path, capsys):
    other = put(tmp_path / "other", model_of("qwen3"), tokenizer_of(V - 1))
    with one_line(capsys, f"'w{V - 1}'"):
        opd.load_pair(f"{store}/qwen3-student", other)

def test_tokenizers_that_differ_in_special_tokens_alone_get_one_warning(store, tmp_path, capsys):
    other = tokenizer_of()
    other.add_special_tokens({"additional_special_tokens": ["<think>"]})
    pair = opd.load_pair(f"{store}/qwen3-student", put(tmp_path / "t", model_of("qwen3"), other))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "'<think>'" in warning and pair.width == V

def test_a_kernel_that_rounds_differently_is_no_capped_family(store, monkeypatch):
    real = transformers.Qwen3ForCausalLM.forward
    def noisy(self, *args, **more):
        output = real(self, *args, **more)
        output.logits = output.logits * (1 + 1e-3 * torch.randn_like(output.logits))
        return output
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", noisy)
    assert load(store).width == V

def test_code_and_pickles_of_a_model_folder_are_not_run(store, tmp_path, capsys):
    path = put(tmp_path / "pickled", model_of("qwen3"))
    torch.save(model_of("qwen3").state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with one_line(capsys, "safetensors"):
        opd.load_pair(path, path)

# ---- The embedded pair

def test_the_problems_of_the_demo_add_up_unless_their_writer_slips():
    wrong = Counter()
    for seed in range(400):
        dice = random.Random(seed)
        start, step = dice.randint(1, 24), dice.randint(2, 9)
        for slips in (0.0, 0.7):
            prompt, response, answer = opd.problem("bus", start, step, dice, slips=slips)
            assert prompt == f"A bus starts at {start} and returns every {step} hours:"
            sums = re.findall(r"(\w+) \w+ adds (\d+) to (\d+) and gets (\d+)\.", response)
            assert [ordinal for ordinal, *_ in sums] == ["First", "Second", "Third", "Fourth"]
            clock = list(range(1, 25)) * 2
            hour = start
            for _, added, before, total in sums:
                assert (int(added), int(before)) == (step, hour)
                right, hour = clock[hour + step - 1], int(total)
                assert hour in (right, clock[right])  # at most one too high
                wrong[slips] += hour != right
            assert response.endswith(f" So it ends at {hour}.")
            assert int(answer) == clock[clock[start + 2 * step - 1] + 2 * step - 1]
            assert slips or opd.is_right(response, answer)
    assert wrong[0.0] == 0 and 0.25 < wrong[0.7] / 1600 < 0.45  # 0.7 of the hard half

def test_the_house_style_is_a_matter_of_one_word():
    plain, house = (opd.problem("bus", 5, 7, random.Random(0), style=style)[1] for style in (0, 1))
    assert house.count("obtains") == 4 and house.replace("obtains", "gets") == plain
    assert opd.is_right(plain, opd.problem("bus", 5, 7, random.Random(0))[2])

def test_the_demo_is_built_once_and_an_interrupted_build_is_not_mistaken_for_one(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opd, "tqdm", lambda steps, **_: list(steps)[:2])  # two steps of training
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opd.build_pair()
    assert not opd.PAIR.exists()
    pair, training, held_out = opd.prepare(opd.parse_args([]))
    examples = training + held_out
    monkeypatch.setattr(opd, "build_pair", interrupted)  # not again
    assert opd.prepare(opd.parse_args([]))[1:] == (training, held_out) and len(held_out) == 192
    cases = [tuple(re.findall(r"\d+", pair.tokenizer.decode(prompt))) for prompt, _ in examples]
    assert len(examples) == 768 and len(set(cases)) == 192  # four things for every sum
    assert not set(cases[:-opd.DEMO["eval_prompts"]]) & set(cases[-opd.DEMO["eval_prompts"]:])
    for word in ("gets", "obtains", *map(str, range(1, 25))):
        assert len(pair.tokenizer.tokenize(" " + word)) == 1

# ---- diagnose.py: the statistics

def clusters(n=12, each=5, seed=0):
    generator = np.random.default_rng(seed)
    return generator, np.repeat(np.arange(n), each)

def repeated(weights_row, context):  # the positions of one bootstrap draw, spelled out
    return np.repeat(np.arange(len(context)), weights_row[context].astype(int))

def z(values):
    return (values - values.mean()) / values.std()

def test_least_squares_agrees_with_lstsq_on_every_resampled_data_set():
    generator, context = clusters()
    x, y, outcome = generator.normal(size=(3, len(context)))
    weights = diagnose.cluster_weights(12, 20, seed=1)
    slopes, r2 = diagnose.ols([x, y], outcome, context, weights)
    for row, slope, explained in zip(weights, slopes, r2):
        at = repeated(row, context)
        X = np.column_stack([np.ones(len(at)), z(x)[at], z(y)[at]])
        solution, residual, *_ = np.linalg.lstsq(X, z(outcome)[at], rcond=None)
        total = ((z(outcome)[at] - z(outcome)[at].mean())**2).sum()
        assert slope == pytest.approx(solution[1:])
        assert explained == pytest.approx(1 - residual[0] / total)

def test_rank_correlation_agrees_with_loops_on_every_resampled_data_set():
    generator, context = clusters()
    x, y = generator.integers(0, 6, size=(2, len(context)))  # many ties
    weights = diagnose.cluster_weights(12, 10, seed=1)
    for row, correlation in zip(weights, diagnose.spearman(x, y, context, weights)):
        at = repeated(row, context)
        a, b = ([np.mean([i for i, v in enumerate(sorted(values)) if v == value])
                 for value in values] for values in (x[at].tolist(), y[at].tolist()))
        assert correlation == pytest.approx(np.corrcoef(a, b)[0, 1])

def test_group_means_and_quantile_groups_are_those_worked_out_by_hand():
    assert diagnose.quantile_group(np.array([5.0, 1, 9, 3, 7, 2]), 3).tolist() == [1, 0, 2, 1, 2, 0]
    outcome, context = np.array([1.0, 2, 3, 10]), np.array([0, 0, 1, 1])
    member, weights = np.array([True, True, True, False]), np.array([[1, 1], [2, 0], [0, 2]])
    assert diagnose.group_mean(outcome, member, context, weights).tolist() == [2, 1.5, 3]

def test_intervals_are_percentiles_of_the_draws_alone():
    draws = np.concatenate([[1000.0], np.arange(101.0)])
    assert diagnose.estimate(draws) == {"value": 1000, "low": 2.5, "high": 97.5}

def test_the_bootstrap_resamples_contexts_not_positions():
    # 20 contexts of 50 equal values each: resampling positions would find 1000 independent ones.
    generator, context = clusters(20, 50)
    values = generator.normal(size=20)[context]
    weights = diagnose.cluster_weights(20, 2000, seed=1)
    assert (weights.sum(1) == 20).all() and (weights[0] == 1).all()
    by_context = diagnose.group_mean(values, np.ones(1000, bool), context, weights)[1:].std()
    by_position = np.array([generator.choice(values, 1000).mean() for _ in range(2000)]).std()
    assert by_context == pytest.approx(values.std() / math.sqrt(20), rel=0.1)
    assert by_context > 5 * by_position

def made_up(effect, contexts=60, each=30):
    """Positions out of thin air, whose gains D_learn explains by `effect` -> scores, G, args."""
    generator, context = clusters(contexts, each)
    n = len(context)
    names = ["H", "H_teacher", *(f"{z}{k}" for z in "DC" for k in (8, 16, 32)), "position"]
    scores = {name: generator.uniform(size=n) for name in names + list(diagnose.MEASURES)}
    scores |= {"context": context, "id": generator.integers(0, 9, size=n)}
    learn = diagnose.features(scores, 16)["D_learn"]
    noise = lambda: (0.3 * generator.normal(size=contexts)[context]
                     + 0.2 * generator.normal(size=n))
    G = {name: effect * learn + noise() for name in diagnose.MEASURES}
    args = SimpleNamespace(contexts=contexts, bootstrap=200, seed=1, top_k=16, supports=(8, 16, 32),
                           budget=0.1)
    return scores, G, args

def tabulated(scores, G, args):  # -> {label: cells} of each of the five tables
    return [rows for *_, rows in diagnose.tables(scores, G, args, lambda token: f"t{token}")]

def values(cells):
    return [cell["value"] for cell in cells if isinstance(cell, dict)]

def test_the_report_is_that_of_a_plain_recomputation():
    scores, G, args = made_up(0.5)
    explained, q3, ranks, matched, kept = tabulated(scores, G, args)
    n, seen = len(scores["H"]), lambda name: scores[name].tolist()
    tilde = lambda name: np.array(normalized(seen(name), seen(name)))
    h, teacher, position = tilde("H"), tilde("H_teacher"), scores["position"]
    ratio = [g / (kl + 1e-12) for g, kl in zip(G["forward_kl"], scores["forward_kl"])]
    low, high = quantile(ratio, 0.01), quantile(ratio, 0.99)
    outcomes = G | {"forward_kl, relative": np.array([min(max(r, low), high) for r in ratio])}
    assert len(explained) == 12 and len(q3) == 11 and len(matched) == 25 and len(kept) == 9
    for k in (8, 16, 32):
        d, c = tilde(f"D{k}"), tilde(f"C{k}")
        for name, outcome in outcomes.items():
            fits = []
            for columns in ([h, d * c, d * (1 - c), position, teacher],
                            [h, d, h * d, position, teacher]):
                X = np.column_stack([np.ones(n), *map(z, columns)])
                solution, residual, *_ = np.linalg.lstsq(X, z(outcome))
                fits.append((solution[2], solution[3], 1 - residual[0] / n))
            (learn, incompat, r2), (_, _, baseline) = fits
            cells = explained[f"{name}, K={k}"]
            assert values(cells) == pytest.approx([learn, incompat, learn - incompat], abs=1e-5)
            assert cells[3:] == [f"{r2:.3f}", f"{baseline:.3f}"]
        inside = [i for i in range(n) if h[i] <= np.median(h) and d[i] >= np.median(d)]
        by_c = sorted(inside, key=lambda i: c[i])  # thirds of equal size, the first one the larger
        edge = lambda part: math.ceil(part * len(inside))
        bottom, top_third = by_c[:edge(1 / 3)], by_c[edge(2 / 3):]
        expected = [np.mean(g[top_third]) - np.mean(g[bottom]) for g in G.values()]
        assert values(q3[f"K={k} top - bottom third of C"]) == pytest.approx(expected, abs=1e-6)
    d, c = tilde("D16"), tilde("C16")
    inside = [i for i in range(n) if h[i] <= np.median(h) and d[i] >= np.median(d)]
    for label, feature in (("D_learn", d * c), ("D_incompat", d * (1 - c))):
        order = sorted(inside, key=lambda i: feature[i])
        for quarter in range(4):
            part = [i for at, i in enumerate(order) if at * 4 // len(order) == quarter]
            expected = [np.mean(g[part]) for g in G.values()]
            found = values(q3[f"K=16 {label} quartile {quarter + 1}"])
            assert found == pytest.approx(expected, abs=1e-6)
    features = {"D": d, "D_learn": d * c, "D_incompat": d * (1 - c), "H": h}
    for name, feature in (features | {"TIP": h + d - h * d}).items():
        for cell, g in zip(ranks[name], G.values()):
            order = [np.argsort(np.argsort(x, kind="stable")) for x in (np.round(feature, 6), g)]
            assert cell["value"] == pytest.approx(np.corrcoef(*order)[0, 1], abs=0.02)
    scored = {
        "teachability": d * c, "entropy": h, "divergence": d, "incompatible": d * (1 - c),
        "compatibility": c}
    for name, feature in scored.items():
        for share in (0.03, 0.05, 0.1):
            best = sorted(range(n), key=lambda i: -np.float32(feature[i]))[:math.ceil(share * n)]
            expected = [np.mean(g[best]) for g in G.values()]
            assert values(matched[f"{share:.0%} {name}"]) == pytest.approx(expected, abs=2e-3)
        counts = Counter(scores["id"][best].tolist()).most_common(5)
        shares = [f"{count / len(best):.0%}" for _, count in counts]
        assert re.findall(r"\d+%", kept[name][0]) == shares
    assert values(matched["100% full"]) == pytest.approx([g.mean() for g in G.values()])

def test_overlap_is_the_probability_that_both_models_agree_on():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    assert diagnose.overlap(p.log(), q.log()) == pytest.approx(0.1 + 0.3 + 0.2)
    assert diagnose.overlap(p.log(), p.log()) == pytest.approx(1)

def test_a_planted_effect_is_recovered_and_an_absent_one_is_not():
    explained, q3, ranks, matched, _ = tabulated(*made_up(1.0))
    absent, *_ = tabulated(*made_up(0.0))
    learn, incompat, gap, *_ = explained["forward_kl, K=16"]
    assert learn["low"] > 0.3 and abs(incompat["value"]) < 0.1 and gap["low"] > 0
    assert ranks["D_learn"][0]["low"] > 0.2
    assert q3["K=16 top - bottom third of C"][0]["low"] > 0
    assert matched["10% teachability"][0]["low"] > matched["10% random"][0]["high"]
    gaps = [cells[2] for cells in absent.values()]  # each misses 0 by chance once in twenty times
    assert sum(gap["low"] < 0 < gap["high"] for gap in gaps) >= 10
    assert all(float(cells[3]) < 0.02 for cells in absent.values())

def test_a_constant_feature_is_named_instead_of_printing_nan(capsys):
    scores, G, args = made_up(0.0)
    scores["H_teacher"][:] = 1
    with one_line(capsys, "H_teacher"):
        tabulated(scores, G, args)

# ---- diagnose.py: the program

def diagnosis(store, out, *more):
    diagnose.main(flags(store, out, "--contexts", 12, "--bootstrap", 50, *more))
    positions = [json.loads(line) for line in open(out / "positions.jsonl")]
    report, page = ((out / f"report.{kind}").read_text() for kind in ("json", "html"))
    return json.loads(report), positions, page

@pytest.fixture(scope="session")
def measured(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    prompts_file(folder / "many.jsonl", 30)
    more = ["--prompts", folder / "many.jsonl", "--steps", 5]
    return folder, diagnosis(store, folder / "out", *more)

def test_a_real_diagnosis_reports_all_five_parts_with_intervals(measured):
    _, (report, positions, page) = measured
    assert report["args"]["contexts"] == 12 == len({line["context"] for line in positions})
    assert f"{len(positions)} positions" in report["summary"]
    assert "nan" not in json.dumps(report).lower() and len(report["tables"]) == 5
    for _, _, columns, table in report["tables"]:
        for cells in table.values():
            assert len(cells) == len(columns)
            assert all(c["low"] <= c["high"] for c in cells if isinstance(c, dict))
    assert "<script" not in page and "http" not in page and page.count('class="t"') > 12

def test_the_gains_are_those_of_both_models_on_the_frozen_contexts(store, measured):
    folder, (_, positions, _) = measured
    pair, first = load(store), [line for line in positions if line["context"] == 0]
    lines = (folder / "many.jsonl").read_text().splitlines()[-12:]
    prompt = pair.tokenizer(json.loads(lines[0])["prompt"]).input_ids
    p, q = own_logits(pair, prompt, [line["id"] for line in first])
    for line, x, y in zip(first, map(softmax, rows(p)), map(softmax, rows(q))):
        found = [line["forward_kl"], line["reverse_kl"], line["overlap"]]
        assert found == pytest.approx([kl(y, x), kl(x, y), sum(map(min, x, y))], abs=1e-4)
        assert line["token"] == f"w{line['id']}" or line["id"] < 3

def test_features_come_from_before_training_alone_and_an_unchanged_student_gains_nothing(
        store, measured, tmp_path):
    folder, (_, positions, _) = measured
    more = ["--prompts", folder / "many.jsonl", "--eval-prompts", 12]
    after = lambda name, path: diagnosis(store, tmp_path / name, *more, "--after", path)
    _, other, _ = after("other", store / "qwen3-teacher")
    same_report, same, _ = after("same", store / "qwen3-student")
    theta0 = lambda line: {k: v for k, v in line.items() if not k.startswith("gain")}
    for a, b, c in zip(positions, other, same):
        assert theta0(a) == theta0(b) == theta0(c)
        assert all(c[f"gain_{name}"] == 0 for name in diagnose.MEASURES)
        for name in ("forward_kl", "reverse_kl"):  # the teacher as theta1 has no KL left
            assert b[f"gain_{name}"] == pytest.approx(b[name], abs=1e-5)
        assert b["gain_overlap"] == pytest.approx(1 - b["overlap"], abs=1e-5)
    assert len(positions) == len(other) == len(same) and "not changed" in same_report["summary"]

def test_the_evidence_tables_are_means_over_reports_and_follow_from_the_positions(measured):
    folder, (report, *_) = measured
    result = subprocess.run([sys.executable, ".evidence/tables.py", folder / "out", folder / "out"],
                            cwd=HERE, capture_output=True, text=True, timeout=100)
    gap = report["tables"][0][3]["reverse_kl, K=16"][2]["value"]
    row, again = re.findall(r"^reverse_kl, K=16 .*|^ +[+-].*", result.stdout, re.M)[:2]
    assert f"{gap:+.3f} ± 0.000" in row and again.split()[-4:-1] == [f"{gap:+.3f}", "±", "0.000"]

def test_the_page_shows_a_hostile_token_and_does_not_run_it():
    hostile = "<script>alert('x')</script>\" onmouseover=\"alert(1)\n "
    page = diagnose.token_map([(hostile, [(hostile, 0.5, 0.2, hostile)])])
    assert "<script" not in page and "&lt;script&gt;" in page and 'onmouseover="' not in page
    assert "↵" in page and "·" in page

def test_bad_input_to_the_diagnostic_gets_one_line(store, measured, tmp_path, capsys):
    folder, _ = measured
    put(tmp_path / "wide", model_of("qwen3", width=24))
    put(tmp_path / "other", model_of("qwen3"), tokenizer_of(V - 1))
    for flag, value, says in (
            ("--contexts", 2, "--contexts"), ("--after", tmp_path / "none", "--after"),
            ("--after", tmp_path / "wide", "other shapes"), ("--bootstrap", 0, "--bootstrap"),
            ("--after", tmp_path / "other", "tokenizer"), ("--resume", tmp_path, "--after")):
        with one_line(capsys, says):
            diagnosis(store, tmp_path / "out", "--prompts", folder / "many.jsonl", flag, value)
    assert not list((tmp_path / "out").glob("report*"))

def test_compare_pairs_runs_by_seed_and_names_what_is_missing(tmp_path, capsys):
    for method, seed, right in (("full", 0, 0.5), ("full", 1, 0.7), ("random", 0, 0.3),
                                ("tip", 0, 0.4), ("tip", 1, 0.8)):
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        args = {"select": method, "budget": 0.1, "seed": seed}
        after = {"accuracy": right, "reverse_kl": 2.0, "entropy": 1.0, "agreement": 0.75}
        summary = {"args": args, "before": after | {"accuracy": 0.1 + seed / 10}, "after": after}
        (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "broken").mkdir()
    diagnose.main(["--compare", *map(str, sorted(tmp_path.iterdir()))])
    out = capsys.readouterr().out
    # mean 0.6, sample deviation 0.283; minus full: -0.1 and 0.1; minus random: 0.1, seed 0 alone
    assert ("| tip | 10% | 2 | 0.600 ± 0.283 | 2.000 ± 0.000 | 0.750 ± 0.000 | +0.000 ± 0.141 "
            "| +0.100 |") in out
    assert "| full | 100% | 2 |" in out and "broken" in out
    assert "| before training | 0% | 2 | 0.150 ± 0.071 |" in out
    assert "-0.450 ± 0.071 | - |" in out  # 0.1 - 0.5 and 0.2 - 0.7

# ---- The block of README section 6 that puts the selection into TRL, executed as it stands there

def trainer_of(folder, size, accumulation=1, steps=1):
    pytest.importorskip("trl")
    from datasets import Dataset
    block = {}
    exec(re.search(r"```python\n(import [^\n]*\nfrom trl.*?)```", README, re.S)[1], block)
    pair = opd.load_pair(f"{folder}/student", f"{folder}/teacher")
    config = block["DistillationConfig"](
        output_dir=f"{folder}/out", per_device_train_batch_size=size, max_steps=steps, beta=1.0,
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, max_completion_length=6,
        temperature=1.0, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, activation_checkpointing=False, shuffle_dataset=False)
    prompts = Dataset.from_list([{"prompt": f"w{3 + i} w9" + " w8" * (i % 3)} for i in range(24)])
    return pair, block["SelectiveDistillationTrainer"](
        model=pair.student, teacher_model=pair.teacher, args=config, train_dataset=prompts,
        eval_dataset=prompts, processing_class=pair.tokenizer)

def as_rollout(batch):
    ids, attention = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1)
                      for name in ("ids", "mask"))
    mask = batch["completion_mask"] > 0
    return opd.Rollout(ids, attention, mask, torch.zeros(mask.shape), mask.all(1))

def selection_of_opd(pair, rollout):
    args = SimpleNamespace(micro_batch_size=99, top_k=16, select="teachability", budget=0.1)
    return opd.select(opd.score(pair, rollout, args)[0], rollout.mask, args, None)

def test_trl_trains_on_the_mask_and_with_the_gradient_of_opd(tmp_path):
    uneven_pair(tmp_path)
    pair, trainer = trainer_of(tmp_path, 8)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rollout, keep = as_rollout(batch), batch["tool_mask"] > 0
    assert torch.equal(keep & rollout.mask, selection_of_opd(pair, rollout))
    assert batch["num_items_in_batch"] == keep.sum() < rollout.mask.sum()
    trainer.compute_loss(trainer.model, batch).backward()
    theirs = torch.cat([w.grad.flatten() for w in pair.student.parameters()])
    ours = gradient(pair, rollout, keep, 8)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.01)

def test_in_trl_the_budget_is_that_of_all_accumulated_batches_and_evaluation_keeps_all(tmp_path):
    uneven_pair(tmp_path)
    pair, trainer = trainer_of(tmp_path, 4, accumulation=2)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    first, second = trainer._buffered_inputs
    whole = {key: torch.cat([first[key], second[key]]) for key in first if first[key].dim() > 1}
    keep, rollout = whole["tool_mask"] > 0, as_rollout(whole)
    assert torch.equal(keep, selection_of_opd(pair, rollout))  # in the shuffled order, too
    assert first["num_items_in_batch"] == second["num_items_in_batch"] == keep.sum()
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    assert "tool_mask" not in batch

PROCESS = """
import sys, torch, test_opd
folder, batches = sys.argv[1], []
pair, trainer = test_opd.trainer_of(folder, 4, steps=2)
real, rank = trainer._generate_and_score_completions, trainer.accelerator.process_index
trainer._generate_and_score_completions = lambda inputs: batches.append(real(inputs)) or batches[-1]
trainer.train()
weights = torch.cat([w.detach().flatten() for w in pair.student.parameters()])
torch.save((batches, weights), f"{folder}/rank-{rank}.pt")
"""

def test_in_trl_two_processes_select_together_and_stay_the_same(tmp_path):
    pytest.importorskip("trl")
    uneven_pair(tmp_path)
    (tmp_path / "process.py").write_text(PROCESS)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         tmp_path / "process.py", tmp_path], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    (mine, weights), (other, others) = (torch.load(tmp_path / f"rank-{i}.pt") for i in (0, 1))
    assert len(mine) == 2 and torch.equal(weights, others)
    assert not torch.equal(weights, load_weights(tmp_path / "student"))
    first = [mine[0], other[0]]  # the first step: both still have the student's own weights
    for batch in first:
        for key, value in batch.items():  # to one width: prompts of 8, responses of 6
            if value.dim() > 1:
                width = (8 - value.shape[1], 0) if "prompt" in key else (0, 6 - value.shape[1])
                batch[key] = torch.nn.functional.pad(value, width)
    both = as_rollout({key: torch.cat([batch[key] for batch in first])
                       for key in mine[0] if mine[0][key].dim() > 1})
    keep = torch.cat([batch["tool_mask"] for batch in first]) > 0
    assert not torch.equal(both.ids[:4], both.ids[4:])
    assert torch.equal(keep, selection_of_opd(opd.load_pair(
        f"{tmp_path}/student", f"{tmp_path}/teacher"), both))
    ranked = math.ceil(0.1 * int(both.mask.sum()))
    assert ranked <= keep.sum() <= ranked + len(keep) and (keep.sum(1) > 0).all()
    assert all(batch["num_items_in_batch"] == keep.sum() for batch in first)

# ---- The README

def test_the_worked_example_of_the_readme_is_right():
    p = torch.tensor([0.85, 0.07, 0.02, 0.02, 0.02, 0.02])
    learnable = torch.tensor([0.05, 0.87, 0.02, 0.02, 0.02, 0.02])
    incompatible = torch.tensor([0.245, 0.02, 0.675, 0.02, 0.02, 0.02])
    s = p.log().expand(2, 6).clone().requires_grad_()
    t = torch.stack([learnable, incompatible]).log()
    rounded = lambda values: [round(x, 2) for x in torch.as_tensor(values).tolist()]
    assert rounded(opd.entropy(s)) == [0.64, 0.64] and rounded(opd.forward_kl(s, t)) == [2.05, 2.05]
    D, C = opd.divergence(s, t, 2), opd.compatibility(s, t, 2)
    assert rounded(D) == [2.23, 2.18] and rounded(C) == [0.92, 0.27]
    assert rounded(D * C) == [2.05, 0.58] and rounded(D * (1 - C)) == [0.18, 1.6]
    (gradient,) = torch.autograd.grad(opd.reverse_kl(s, t).sum(), s)
    assert rounded([gradient[0, 1], gradient[1, 2]]) == [-0.33, -0.09]
    for number in ("0.64", "2.05", "2.23", "2.18", "0.92", "0.27", "0.58", "0.18", "1.60", "-0.33",
                   "-0.09"):
        assert number in README

def test_every_command_of_the_readme_uses_flags_that_exist_and_its_figures_are_there():
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert figures and all(0 < (HERE / figure).stat().st_size < 200_000 for figure in figures)
    scripts = README + (HERE / ".evidence/runs.sh").read_text()
    commands = re.findall(r"python (opd|diagnose)\.py((?:[^\n`]|\\\n)*)", scripts)
    known = {}
    for name, run in (("opd", "parse_args"), ("diagnose", "main")):
        text = python(f"import {name}; {name}.{run}(['--help'])").stdout
        known[name] = set(re.findall(r"--[a-z-]+", text))
    assert len(commands) >= 8
    for name, rest in commands:
        unknown = set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - known[name]
        assert not unknown, f"{name}.py{rest}: {unknown}"
