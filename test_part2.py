"""Second half of the tests of opd.py: the program."""

# --- shared helpers

import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import opd

HERE = Path(__file__).parent
V = 64  # vocabulary of the tiny models
PROMPTS = [[5, 6, 7, 8, 9], [5], [10, 11, 12]]


def softmax(scores):
    top_score = max(scores)
    powers = [math.exp(s - top_score) for s in scores]
    return [x / sum(powers) for x in powers]


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def top(probabilities, k):
    best_first = sorted(range(len(probabilities)), key=lambda v: -probabilities[v])
    return set(best_first[:k])


def rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).double().tolist()


def tokenizer_of(size=V, **special):
    words = {"<eos>": 0, "<s>": 1, "<end>": 2}
    for i in range(3, size):
        words[f"w{i}"] = i
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "pad_token": "<eos>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def model_of(family, seed=0, vocab=V, width=16, scale=3.0, **more):
    torch.manual_seed(seed)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=2,
            n_head=2,
            n_positions=64,
            eos_token_id=0,
            bos_token_id=None,
            **more,
        )
    else:
        name = {"qwen3": "Qwen3", "llama": "Llama", "gemma2": "Gemma2"}[family]
        sizes = {
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "eos_token_id": 0,
            "bos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            **more,
        }
        config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Otherwise every distribution is flat.
    model.get_output_embeddings().weight.data.mul_(scale)
    return model


def put(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)


def prompts_file(path, count=12, **more):
    dice = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            words = " ".join(f"w{dice.randint(3, V - 1)}" for _ in range(1 + i % 5))
            record = {"prompt": words, "answer": f"w{3 + i}", **more}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama", "gpt2"):
        width = 24 if family == "gpt2" else 16
        put(folder / f"{family}-student", model_of(family, seed=1))
        put(folder / f"{family}-teacher", model_of(family, seed=2, width=width))
    prompts_file(folder / "prompts.jsonl")
    return folder


def flags(store, out, *more, family="qwen3"):
    pair = ["--student", f"{store}/{family}-student"]
    pair += ["--teacher", f"{store}/{family}-teacher"]
    pair += ["--prompts", f"{store}/prompts.jsonl", "--out", str(out)]
    sizes = "--steps 3 --batch-size 4 --max-new-tokens 6 --lr 1e-3"
    sizes += " --eval-prompts 4 --device cpu"
    return [*pair, *sizes.split(), *map(str, more)]


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
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.state_dict()


def load_weights(folder):
    return torch.cat([w.flatten() for w in weights_of(folder).values()])


def same_weights(a, b):
    return torch.equal(load_weights(a), load_weights(b))


@contextmanager
def one_line(capsys, says, status=2):
    """What stands inside stops with this status and one clear line at the end."""
    with pytest.raises(SystemExit) as stop:
        yield
    error = capsys.readouterr().err
    assert stop.value.code == status
    assert "Traceback" not in error
    assert error.startswith("error: ") or error.count("\nerror: ") == 1
    assert re.search(says, error.strip().splitlines()[-1])


def finite(log):
    return all(math.isfinite(value) for line in log for value in line.values())


def timeless(log):
    lines = []
    for line in log:
        lines.append({key: line[key] for key in line if "seconds" not in key})
    return lines


def load(store, family="qwen3", **more):
    student = f"{store}/{family}-student"
    return opd.load_pair(student, f"{store}/{family}-teacher", **more)


def draw(pair, prompts=PROMPTS, length=6):
    torch.manual_seed(0)
    return opd.rollout(pair, prompts, length)


def own_logits(pair, prompt, response):
    """Both models' that predict the response: whole models, alone, no padding."""
    ids = torch.tensor([prompt + response])
    return [model(ids).logits[0, len(prompt) - 1 : -1] for model in pair[:2]]


def one_by_one(pair, prompts, batch):
    """One response at a time -> student's logits, teacher's, response."""
    for response, mask, prompt in zip(batch.responses, batch.mask, prompts):
        ids = response[mask].tolist()
        yield *own_logits(pair, prompt, ids), ids


def recorded_rollouts(monkeypatch):
    real = opd.rollout
    calls = []

    def rollout(pair, prompts, length):
        batch = real(pair, prompts, length)
        calls.append((prompts, batch))
        return batch

    monkeypatch.setattr(opd, "rollout", rollout)
    return calls


def python(code, *args, **more):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=100,
        **more,
    )


# --- end of shared helpers


# ======================================================================================
# The program
# ======================================================================================


@pytest.mark.parametrize(
    "family,loss,method",
    [
        ("qwen3", "reverse_kl", "teachability"),
        ("llama", "sampled", "tip"),
        ("gpt2", "forward_kl", "random"),
    ],
)
def test_a_real_run_leaves_a_student_a_log_and_a_summary(
    run, store, tmp_path, family, loss, method, capsys
):
    out = tmp_path / "out"
    log = run("out", "--loss", loss, "--select", method, family=family)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert finite(log)
    for line in log:
        assert line["valid"] == 4 * line["mean_length"]
        best = math.ceil(0.1 * line["valid"])
        assert best <= line["kept"] <= best + 4 < line["valid"]
    learning_rates = [line["lr"] for line in log]
    assert learning_rates == pytest.approx([1e-4, 2e-4, 3e-4])  # warming up

    summary = summary_of(out)
    assert set(summary) == {"args", "versions", "seconds", "before", "after"}
    for when in ("before", "after"):
        assert list(summary[when])[:2] == ["accuracy", "reverse_kl"]
        assert all(math.isfinite(value) for value in summary[when].values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert tokenizer("w5").input_ids == [5]
    assert not same_weights(store / f"{family}-student", out / "student")
    assert sorted(path.name for path in out.iterdir()) == [
        "log.jsonl",
        "student",
        "summary.json",
    ]

    printed = capsys.readouterr().out
    assert re.search(r"^accuracy +0\.", printed, re.M)
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize("steps,apart", [(5, 1), (21, 2)])
def test_the_terminal_shows_each_tenth_of_the_run_and_the_log_every_step(
    run, capsys, steps, apart
):
    log = run("out", "--steps", steps)
    printed = capsys.readouterr().out
    heading, *shown = re.findall(r"^ +(?:step|\d+)  .*", printed, re.M)
    assert heading.split()[:3] == ["step", "loss", "kl_all"]
    assert len(log) == steps
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
    texts = []
    for ids, mask in zip(batch.responses, batch.mask):
        words = [f"w{i}" for i in ids[mask].tolist() if i > 2]
        texts.append(" ".join(words))
    answers = [texts[0], None, texts[2] + "9"]  # right, not asked, wrong
    examples = []
    for prompt, answer in zip(prompts, answers):
        examples.append({"prompt": prompt, "answer": answer})
    measured = opd.evaluate(pair, examples, args)

    values = []
    for p, q, _ in one_by_one(pair, prompts, batch):
        for x, y in zip(map(softmax, rows(p)), map(softmax, rows(q))):
            entropy = -sum(a * math.log(a) for a in x)
            values.append((kl(x, y), kl(y, x), entropy, top(x, 1) == top(y, 1)))
    means = [sum(column) / len(values) for column in zip(*values)]
    names = ["reverse_kl", "forward_kl", "entropy", "agreement"]
    assert [measured[name] for name in names] == pytest.approx(means, abs=1e-4)
    assert measured["accuracy"] == 0.5
    assert measured["mean_length"] == pytest.approx(len(values) / 3)
    unended = [0 not in ids for ids in batch.responses.tolist()]
    assert measured["truncated"] == pytest.approx(sum(unended) / 3)
    assert repr(texts[0]) in capsys.readouterr().out  # the printed sample


def test_evaluation_weighs_positions_alike_however_they_are_batched(store):
    # Batches of 4 and 1 responses: a mean of their means would differ.
    pair = load(store)
    examples = [{"prompt": [5 + i], "answer": "w9"} for i in range(5)]
    args = opd.parse_args(flags(store, "unused", "--batch-size", 1))
    args.temperature = pair.temperature
    torch.manual_seed(args.seed)
    sums = Counter()
    for part in (examples[:4], examples[4:]):
        batch = opd.rollout(pair, [e["prompt"] for e in part], args.max_new_tokens)
        scores = opd.score(pair, batch, 4, 4)
        sums["kl"] += scores["kl_all"].sum().item()
        sums["valid"] += batch.mask.sum().item()
    found = opd.evaluate(pair, examples, args)
    assert found["reverse_kl"] == pytest.approx(sums["kl"] / sums["valid"], rel=1e-4)
    assert found["mean_length"] == pytest.approx(sums["valid"] / 5)


def test_without_answers_there_is_no_accuracy(run, tmp_path):
    lines = [json.dumps({"prompt": f"w5 w{6 + i}"}) + "\n" for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    summary = summary_of(tmp_path / "out")
    assert "accuracy" not in summary["after"]
    assert "reverse_kl" in summary["after"]


def test_same_seed_same_log_and_other_seed_other_log(run, tmp_path):
    a = timeless(run("a", "--seed", 3))
    b = timeless(run("b", "--seed", 3))
    c = timeless(run("c", "--seed", 4))
    assert same_weights(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert a == b
    assert a != c


def test_the_seed_changes_the_samples_and_not_only_the_order_of_the_prompts(
    run, tmp_path
):
    lines = ['{"prompt": "w5 w6"}\n'] * 8 + ['{"prompt": "w7"}\n'] * 4
    (tmp_path / "p.jsonl").write_text("".join(lines))
    a = run("a", "--seed", 3, "--prompts", tmp_path / "p.jsonl")
    b = run("b", "--seed", 4, "--prompts", tmp_path / "p.jsonl")
    assert a[0]["kl_all"] != b[0]["kl_all"]


def test_budget_one_is_full_opd_bit_for_bit(run, tmp_path):
    full = timeless(run("full", "--select", "full"))
    for method in ("divergence", "random"):
        assert timeless(run(method, "--select", method, "--budget", 1)) == full
        assert same_weights(
            tmp_path / "full" / "student", tmp_path / method / "student"
        )
    assert full[0]["kept"] == full[0]["valid"]


def test_a_rule_of_your_own_ranks_in_place_of_the_method(run, store, tmp_path):
    def by_entropy(scores, mask):
        return scores["entropy"]

    named = run("named", "--select", "entropy", "--steps", 2)
    args = flags(store, tmp_path / "own", "--steps", 2)
    opd.main(opd.parse_args(args), rule=by_entropy)
    own = [json.loads(line) for line in open(tmp_path / "own" / "log.jsonl")]
    assert [line["kept"] for line in own] == [line["kept"] for line in named]
    assert own[0]["loss"] == pytest.approx(named[0]["loss"], rel=1e-4)
    assert summary_of(tmp_path / "own")["args"]["select"] == "by_entropy"


def test_full_distillation_brings_the_student_closer(run, tmp_path):
    more = ["--select", "full", "--steps", 20, "--lr", 2e-2, "--batch-size", 8]
    run("out", *more)
    summary = summary_of(tmp_path / "out")
    assert summary["after"]["reverse_kl"] < 0.7 * summary["before"]["reverse_kl"]


def test_a_bf16_checkpoint_moves_at_a_learning_rate_of_1e_6(run, tmp_path):
    model = model_of("qwen3", seed=1).bfloat16()
    path = put(tmp_path / "bf16", model)
    run("out", "--student", path, "--lr", "1e-6", "--steps", 5, "--select", "full")
    before = model.state_dict()
    after = weights_of(tmp_path / "out" / "student")
    moved = sum((after[name] != before[name].float()).sum().item() for name in after)
    assert moved > 0.9 * sum(w.numel() for w in after.values())


def test_the_first_step_is_that_of_adamw_at_a_tenth_of_the_learning_rate(
    run, store, tmp_path
):
    run("out", "--lr", 1, "--steps", 1, "--select", "full")
    before = weights_of(store / "qwen3-student")
    after = weights_of(tmp_path / "out" / "student")
    # After one step Adam's two moments cancel: all move by lr, after the decay.
    lr = 0.1
    moved = []
    for name, weight in before.items():
        moved.append((after[name] - weight * (1 - lr * 0.1)).abs().flatten())
    moved = torch.cat(moved)
    assert (moved - lr).abs().median() < 5e-5
    assert (moved < lr + 1e-5).all()


@pytest.mark.parametrize(
    "flag,value",
    [
        ("--max-new-tokens", 1),
        ("--top-k", 500),
        ("--budget", "1e-9"),
        ("--batch-size", 1),
        ("--micro-batch-size", 99),
    ],
)
def test_degenerate_settings_run_without_nan(run, flag, value):
    assert finite(run("out", flag, value, "--steps", 2))


def test_responses_of_one_token_and_responses_that_never_end_are_no_problem(
    run, tmp_path, capsys
):
    for name, ends, length in (("stops", list(range(V)), 1), ("never", None, 6)):
        model = model_of("qwen3", seed=1)
        model.config.eos_token_id = ends
        model.generation_config.eos_token_id = ends
        tokenizer = tokenizer_of(eos_token="<eos>" if ends else None)
        path = put(tmp_path / name, model, tokenizer)
        log = run(f"{name}-out", "--student", path, "--teacher", path)
        assert finite(log)
        for line in log:
            assert line["mean_length"] == length
            assert line["truncated"] == (0 if ends else 1)
    warning = "warning: the student has no token that ends a response"
    assert capsys.readouterr().err.count(warning) == 1  # of the second alone


def test_held_out_prompts_are_evaluated_and_all_others_trained_in_turn(
    run, tmp_path, monkeypatch
):
    calls = recorded_rollouts(monkeypatch)
    lines = [json.dumps({"prompt": f"w{3 + i}"}) + "\n" for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    before, *steps, after = ([ids for (ids,) in prompts] for prompts, _ in calls)
    assert before == after == [11, 12, 13, 14]
    assert sorted(steps[0] + steps[1]) == list(range(3, 11))
    assert steps[2] == steps[0]
    assert steps[0] + steps[1] != list(range(3, 11))  # shuffled


def test_a_prompt_that_the_file_repeats_among_the_held_out_is_not_trained_on(
    run, tmp_path, monkeypatch, capsys
):
    calls = recorded_rollouts(monkeypatch)
    words = [3, 11, 4, 5, 14, 6, 11, 11, 12, 13, 14]  # the last four are held out
    lines = [json.dumps({"prompt": f"w{word}"}) + "\n" for word in words]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    assert "p.jsonl: 3 prompts are held out, too" in capsys.readouterr().err
    before, *steps, _ = ([ids for (ids,) in prompts] for prompts, _ in calls)
    assert before == [11, 12, 13, 14]
    assert all(sorted(step) == [3, 4, 5, 6] for step in steps)


def test_where_too_few_prompts_are_not_held_out_one_line_says_so(run, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5"}\n' * 12)
    with one_line(capsys, "p.jsonl: only 0 prompts are not held out"):
        opd.run(run, "out", "--prompts", tmp_path / "p.jsonl")


def test_a_resumed_run_continues_bit_for_bit(run, tmp_path):
    whole = run("whole", "--steps", 5, "--save-every", 2)
    save = tmp_path / "whole" / "step-2"
    rest = run("rest", "--steps", 5, "--resume", save)
    assert timeless(rest) == timeless(whole[2:])
    assert same_weights(tmp_path / "whole" / "student", tmp_path / "rest" / "student")
    without = run("other", "--steps", 5, "--student", save)
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
opd.run(opd.main, opd.parse_args(sys.argv[1:]))
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_save_whole(
    run, store, tmp_path
):
    killed = python(KILL, *flags(store, tmp_path / "out", "--save-every", 1))
    assert killed.returncode == -signal.SIGKILL
    saves = [path.name for path in (tmp_path / "out").glob("step-*")]
    assert sorted(saves) == ["step-1", "step-2.partial"]
    rest = run("rest", "--resume", tmp_path / "out" / "step-1")
    assert [line["step"] for line in rest] == [1, 2]
    assert not (tmp_path / "rest" / "student" / "state.pt").exists()


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_full_disk_gives_one_line_and_keeps_the_earlier_save(
    run, tmp_path, capsys, monkeypatch, library
):
    # Every library has its own exception for it.
    module, name = (torch, "save") if library == "torch" else (opd, "save")
    calls = []
    if library == "torch":
        real = torch.save
        error = RuntimeError("PytorchStreamWriter failed writing file")
    else:
        real = transformers.PreTrainedModel.save_pretrained
        error = safetensors.SafetensorError("No space left on device")

    def full(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **more)

    if library == "torch":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    says = f"step-2 could not be written.*{type(error).__name__}: {error}"
    with one_line(capsys, says, status=1):
        opd.run(run, "out", "--save-every", 1)
    assert weights_of(tmp_path / "out" / "step-1")
    assert not (tmp_path / "out" / "step-2").exists()


def test_ctrl_c_saves_the_student_says_where_and_exits_with_130(
    run, store, tmp_path, monkeypatch, capsys
):
    real = opd.rollout
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # one batch of evaluation, then two steps
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(opd, "rollout", interrupted)
    student = tmp_path / "out" / "student"
    with one_line(capsys, str(student), status=130):
        opd.run(run, "out")
    assert not same_weights(store / "qwen3-student", student)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_saves(
    run, tmp_path, capsys
):
    more = ["--lr", "1e9", "--steps", 30, "--save-every", 1]
    with one_line(capsys, r"step \d+: loss.*--lr", status=1):
        opd.run(run, "out", *more)
    assert weights_of(tmp_path / "out" / "step-1")


def test_a_second_run_never_touches_the_first(
    run, store, tmp_path, capsys, monkeypatch
):
    run("out", "--steps", 1)
    before = load_weights(tmp_path / "out" / "student")
    with one_line(capsys, "--out .*is not empty"):
        opd.run(run, "out", "--seed", 9)
    assert torch.equal(before, load_weights(tmp_path / "out" / "student"))

    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        args = opd.parse_args(flags(store, "x", "--steps", 1))
        args.out = None
        opd.main(args)
    assert (tmp_path / "runs/opd-1/student").exists()
    assert (tmp_path / "runs/opd-2/student").exists()


# ======================================================================================
# Models that are refused, and why
# ======================================================================================


def edited(path, to, file="config.json", **changes):
    """A copy of a model's folder, with some entries of one JSON file changed."""
    shutil.copytree(path, to)
    values = json.loads((to / file).read_text())
    values.update(changes)
    (to / file).write_text(json.dumps(values))
    return str(to)


def untied(seed=0):
    """A model whose head is a weight of its own."""
    return model_of("qwen3", seed, tie_word_embeddings=False)


def test_a_classifier_is_refused_as_its_head_would_be_random(tmp_path):
    config = untied().config
    classifier = transformers.Qwen3ForSequenceClassification(config)
    path = put(tmp_path / "m", classifier)
    with pytest.raises(ValueError, match=f"{path}.* no weight lm_head.weight"):
        opd.load_pair(path, path)


def test_a_base_model_without_its_head_is_refused(store, tmp_path):
    path = put(tmp_path / "m", untied().model)
    with pytest.raises(ValueError, match=f"--teacher {path}.* lm_head.weight"):
        opd.load_pair(f"{store}/qwen3-student", path)


def test_a_model_with_a_layer_too_few_is_refused(store, tmp_path):
    path = edited(
        store / "qwen3-student",
        tmp_path / "m",
        num_hidden_layers=3,
        layer_types=["full_attention"] * 3,
    )
    with pytest.raises(ValueError, match=r"--student .* no weight model\.layers\.2\."):
        opd.load_pair(path, path)


def test_weights_of_another_shape_are_refused(store, tmp_path):
    path = edited(store / "qwen3-student", tmp_path / "m", intermediate_size=48)
    with pytest.raises(ValueError, match=f"--student {path}.*mismatch"):
        opd.load_pair(path, path)


def test_weights_under_a_foreign_prefix_are_refused(tmp_path):
    path = put(tmp_path / "m", untied())
    file = tmp_path / "m" / "model.safetensors"
    weights = {}
    for name, weight in safetensors.torch.load_file(file).items():
        weights[f"wrapped.{name}"] = weight
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no weight lm_head.weight"):
        opd.load_pair(path, path)


def test_weights_that_the_model_does_not_use_get_a_warning(tmp_path, capsys):
    path = put(tmp_path / "m", model_of("qwen3"))
    file = tmp_path / "m" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["value_head.weight"] = torch.zeros(1, 16)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    opd.load_pair(path, path)
    warning = f"warning: --teacher {path}: .*value_head.weight"
    assert re.search(warning, capsys.readouterr().err)


# ---- The probe: can its logits be recomputed here?


SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def probe(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.add_(torch.randn_like(weight))  # no bias stays zero
    opd.check_logits(model.eval())


@pytest.mark.parametrize(
    "family,more",
    [
        ("gpt_neox", {"intermediate_size": 32}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
        ("bloom", {}),
        ("mamba", {"state_size": 4}),
        ("granite", {"intermediate_size": 32, "logits_scaling": 1.0}),
        ("gemma2", {"intermediate_size": 32, "final_logit_softcapping": None}),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
    ],
)
def test_sound_families_pass_the_probe(family, more):
    # ALiBi, learned positions, a recurrent state, experts: none minds our padding.
    probe(transformers.AutoConfig.for_model(family, **SIZES, **more))


def test_a_family_that_caps_its_logits_is_refused_even_where_the_cap_does_nothing(
    tmp_path,
):
    # Training may push logits of 1 up to the cap. At 1 no number shows it.
    for scale, name in ((30.0, "large"), (0.01, "small")):
        model = model_of("gemma2", scale=scale, final_logit_softcapping=30.0)
        path = put(tmp_path / name, model)
        with pytest.raises(ValueError, match=f"{path}.*gemma2.*final_logit_softcap"):
            opd.load_pair(path, path)


@pytest.mark.parametrize(
    "family,name",
    [
        ("cohere", "logit_scale"),
        ("cohere2", "logit_scale"),
        ("granite", "logits_scaling"),
    ],
)
def test_a_family_that_scales_its_logits_is_refused(family, name):
    sizes = {**SIZES, "intermediate_size": 32, "pad_token_id": 0, name: 0.25}
    config = transformers.AutoConfig.for_model(family, **sizes)
    with pytest.raises(ValueError, match=f"{family} models .* by {name}"):
        probe(config)


def test_a_cap_in_a_nested_config_is_found(monkeypatch):
    model = model_of("qwen3")
    text_config = transformers.Gemma2Config(final_logit_softcapping=30.0)
    monkeypatch.setattr(
        type(model.config), "get_text_config", lambda self, **_: text_config
    )
    with pytest.raises(ValueError, match="gemma2 .* final_logit_softcapping"):
        opd.check_logits(model)


def test_rwkv_is_refused_as_it_reads_the_padding():
    config = transformers.RwkvConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, context_length=64
    )
    with pytest.raises(ValueError, match="rwkv model, recomputed .* left padding"):
        probe(config)


def test_a_convolution_with_bias_is_refused_as_it_reads_the_padding_next_to_it():
    sizes = {**SIZES, "intermediate_size": 32}
    sizes["layer_types"] = ["conv", "full_attention"]
    probe(transformers.Lfm2Config(**sizes, conv_bias=False))
    with pytest.raises(ValueError, match="lfm2 model, recomputed .* left padding"):
        probe(transformers.Lfm2Config(**sizes, conv_bias=True))


@pytest.mark.parametrize("family", ["Bert", "XLNet"])
def test_models_that_are_no_decoders_are_refused_with_a_reason_that_is_true(family):
    sizes = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "Bert":
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, **sizes)
    else:
        config = transformers.XLNetConfig(vocab_size=V, d_model=16, n_layer=2, n_head=2)
    with pytest.raises(ValueError, match=f"{family.lower()} model, .* are not its own"):
        probe(config)


def test_a_model_that_gives_nan_is_refused(tmp_path):
    model = model_of("qwen3")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    path = put(tmp_path / "m", model)
    with pytest.raises(ValueError, match="are not its own"):
        opd.load_pair(path, path)


def test_a_model_whose_generation_differs_from_its_forward_pass_is_refused(
    store, monkeypatch
):
    # As with MiniMax, whose linear attention treats padding otherwise in its cache.
    real = transformers.Qwen3ForCausalLM.forward

    def other_with_a_cache(self, *args, **more):
        output = real(self, *args, **more)
        if more.get("use_cache") and output.logits.shape[1] == 1:
            output.logits = output.logits + torch.linspace(0, 0.05, V)
        return output

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", other_with_a_cache)
    with pytest.raises(ValueError, match="qwen3 model, generated under left padding"):
        load(store)


def test_a_kernel_that_rounds_differently_is_no_wrong_family(store, monkeypatch):
    real = transformers.Qwen3ForCausalLM.forward

    def noisy(self, *args, **more):
        output = real(self, *args, **more)
        noise = 1e-5 * torch.randn_like(output.logits)
        output.logits = output.logits * (1 + noise)
        return output

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", noisy)
    assert load(store).vocab_size == V


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"stop_strings": ["w5"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"repetition_penalty": 3.0, "min_new_tokens": 4, "do_sample": True},
        {"eos_token_id": list(range(V))},
    ],
)
def test_the_checkpoints_own_generation_settings_do_not_disturb_the_probe(
    store, tmp_path, settings
):
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, **settings)
    pair = opd.load_pair(path, path)
    for name, value in settings.items():
        assert getattr(pair.student.generation_config, name) == value
    assert draw(pair).ids.max() < V


# ---- Students that cannot be trained, files that cannot be read


@pytest.mark.parametrize("fault", ["frozen", "bf16", "int8"])
def test_a_student_that_is_not_trainable_as_assumed_is_refused_at_once(
    store, monkeypatch, fault
):
    real = opd.load_model

    def with_a_fault(flag, *more):  # as an adapter, or quantised layers, would be
        model, *rest = real(flag, *more)
        weight = model.model.norm.weight
        weight.requires_grad_(False)
        if fault == "bf16":
            weight.data = weight.data.bfloat16()
            weight.requires_grad_()
        if fault == "int8":
            weight.data = weight.data.to(torch.int8)
        return model, *rest

    monkeypatch.setattr(opd, "load_model", with_a_fault)
    says = "--student .*/qwen3-student: model.norm.weight cannot be trained"
    with pytest.raises(ValueError, match=says):
        load(store)


def test_the_teacher_is_frozen_and_the_student_is_not(store):
    pair = load(store)
    assert all(weight.requires_grad for weight in pair.student.parameters())
    assert not any(weight.requires_grad for weight in pair.teacher.parameters())
    assert not pair.student.training and not pair.teacher.training


def cut_in_half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])


def git_lfs_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def config_that_raises(folder):
    values = json.loads((folder / "config.json").read_text())
    values["num_attention_heads"] = "two"
    (folder / "config.json").write_text(json.dumps(values))


def quantised(folder):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(values))


def an_adapter_alone(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickled(folder):
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder):
    values = json.loads((folder / "config.json").read_text())
    values["model_type"] = "own"
    values["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "code.py").write_text("open('/tmp/was-run', 'w')\n")


@pytest.mark.parametrize(
    "damage,says",
    [
        (cut_in_half, "SafetensorError"),
        (git_lfs_pointer, "SafetensorError"),
        (config_that_raises, "num_attention_heads"),
        (quantised, "ImportError"),
        (an_adapter_alone, "config.json"),
        (pickled, "safetensors"),
        (with_code, "custom code"),
    ],
)
def test_a_model_folder_that_cannot_be_loaded_gets_one_line_with_flag_and_path(
    run, store, tmp_path, capsys, damage, says
):
    shutil.copytree(store / "qwen3-student", tmp_path / "m")
    damage(tmp_path / "m")
    with one_line(capsys, f"^error: --teacher {tmp_path}/m on cpu: .*{says}"):
        opd.run(run, "out", "--teacher", tmp_path / "m")
    assert not (tmp_path / "out").exists()


# ---- Two vocabularies


def test_different_tokenizers_are_refused_with_a_token_that_differs(store, tmp_path):
    other = put(tmp_path / "other", model_of("qwen3"), tokenizer_of(V - 1))
    with pytest.raises(ValueError, match=f"'w{V - 1}' has the id {V - 1} .* and None"):
        opd.load_pair(f"{store}/qwen3-student", other)


def with_added(token, **special):
    tokenizer = tokenizer_of(**special)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return tokenizer


def test_tokenizers_that_differ_in_special_tokens_alone_get_one_warning(
    store, tmp_path, capsys
):
    path = put(tmp_path / "t", model_of("qwen3"), with_added("<think>"))
    pair = opd.load_pair(f"{store}/qwen3-student", path)
    (warning,) = re.findall("warning: .*", capsys.readouterr().err)
    assert "'<think>' has the id None in the student's tokenizer and 64" in warning
    assert pair.vocab_size == V


@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize(
    "special", [{"pad_token": "[PAD]"}, {"pad_token": None, "eos_token": "<EOT>"}]
)
def test_a_pad_or_an_end_that_only_one_model_has_is_harmless(
    store, tmp_path, owner, special
):
    # Its id, 64, is beyond the rows of the other model.
    own = model_of("qwen3", vocab=V + 1, seed=3)
    put(tmp_path / "m", own, tokenizer_of(**special))
    paths = {role: f"{store}/qwen3-{role}" for role in ("student", "teacher")}
    paths[owner] = str(tmp_path / "m")
    pair = opd.load_pair(paths["student"], paths["teacher"])
    batch = draw(pair)
    assert pair.vocab_size == V
    scores = opd.score(pair, batch, 4, 2)
    for values in scores.values():
        assert values[batch.mask].isfinite().all()
    is_end = torch.isin(batch.responses, torch.tensor(pair.end_ids))
    assert batch.responses[batch.mask & ~is_end].max() < V


def test_an_only_end_beyond_the_students_rows_gets_a_warning_and_all_run_to_the_limit(
    tmp_path, capsys
):
    model = model_of("qwen3")
    model.config.eos_token_id = model.generation_config.eos_token_id = V
    tokenizer = tokenizer_of(eos_token="<EOT>", pad_token=None)
    path = put(tmp_path / "m", model, tokenizer)
    pair = opd.load_pair(path, path)
    warning = "the student has no token that ends a response"
    assert warning in capsys.readouterr().err
    assert draw(pair).truncated.all()


def test_an_end_id_of_minus_one_is_none(store, tmp_path):
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, eos_token_id=-1)
    pair = opd.load_pair(path, path)
    assert pair.end_ids == [0]  # the tokenizer's
    assert draw(pair).ids.min() == 0


# ---- What belongs to a saved student, and to a run that goes on


def test_the_saved_student_keeps_its_own_generation_config(run, store, tmp_path):
    # Greedy with a temperature is no valid setting: many checkpoints have it.
    own = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.5,
        "eos_token_id": [0, 2],
    }
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, **own)
    run("out", "--student", path, "--steps", 1)
    saved = json.loads((tmp_path / "out" / "student" / file).read_text())
    assert {name: saved[name] for name in own} == own


def test_that_the_saved_student_is_float32_is_said_where_it_is(run, tmp_path, capsys):
    student = put(tmp_path / "bf16", model_of("qwen3").bfloat16())
    run("out", "--student", student, "--steps", 1)
    saved = safetensors.torch.load_file(tmp_path / "out/student/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert "student/ (float32)" in capsys.readouterr().out


@pytest.fixture(scope="session")
def saved(store, tmp_path_factory):
    """A run's save of step 2."""
    out = tmp_path_factory.mktemp("saved") / "out"
    opd.main(opd.parse_args(flags(store, out, "--save-every", 2)))
    return out / "step-2"


@pytest.mark.parametrize(
    "more,says",
    [
        ("--temperature 0.5", "--temperature was 1.0 before and is 0.5 now"),
        ("--batch-size 2", "--batch-size was 4 before and is 2 now"),
        ("--lr 1e-4", "--lr was 0.001 before and is 0.0001 now"),
        ("--select tip", "--select was teachability before and is tip now"),
        ("--budget 0.5", "--budget was 0.1"),
        ("--loss sampled", "--loss was reverse_kl"),
        ("--top-k 3", "--top-k was 16"),
        ("--max-new-tokens 5", "--max-new-tokens was 6"),
        ("--seed 1", "--seed was 0"),
        ("--student llama", "--student was .*qwen3-student"),
        ("--teacher llama", "--teacher was .*qwen3-teacher"),
        ("--prompts other.jsonl", "--prompts, or --eval-prompts, differ"),
        ("--eval-prompts 3", "--prompts, or --eval-prompts, differ"),
        ("--steps 2", "--steps 2: that save is of step 2"),
    ],
)
def test_a_run_that_would_go_on_otherwise_is_refused_with_the_flag(
    run, store, saved, tmp_path, capsys, monkeypatch, more, says
):
    prompts_file(tmp_path / "other.jsonl", 13)
    flag, value = more.split()
    if value == "llama":
        value = f"{store}/llama{flag.replace('--', '-')}"
    if flag == "--prompts":
        value = tmp_path / value
    with one_line(capsys, says):
        opd.run(run, "out", "--resume", saved, flag, value)
    assert not (tmp_path / "out").exists()


def test_what_does_not_change_the_run_may_differ_when_it_goes_on(run, saved):
    more = ["--steps", 4, "--micro-batch-size", 2, "--save-every", 3]
    log = run("out", "--resume", saved, *more)
    assert [line["step"] for line in log] == [2, 3]


def test_a_folder_without_state_is_refused_before_any_model_is_loaded(
    run, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(opd, "load_model", None)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.pt").write_bytes(b"half")
    for folder in (saved.parent / "student", tmp_path / "half", tmp_path / "none"):
        with one_line(capsys, f"--resume {folder}: no state.pt of this version"):
            opd.run(run, "out", "--resume", folder)
        assert not (tmp_path / "out").exists()


# ---- How long prompt and response may be


@pytest.mark.parametrize(
    "name,config",
    [
        ("max_position_embeddings", transformers.LlamaConfig),
        ("n_positions", transformers.GPT2Config),
        ("max_seq_len", transformers.MptConfig),
    ],
)
def test_the_length_limit_is_found_under_each_of_its_names(name, config):
    def model_with(length):
        model = torch.nn.Module()
        model.config = config(**{name: length})
        return model

    pair = opd.Pair(model_with(99), model_with(40), None, [], V, 1.0)
    assert opd.length_limit(pair) == 40
    assert opd.length_limit(pair._replace(teacher=model_with(99))) == 99


def test_the_length_limit_of_a_nested_config_is_found(store):
    text = {"max_position_embeddings": 30, "hidden_size": 16}
    pair = load(store)
    pair.teacher.config = transformers.Gemma3Config(text_config=text)
    assert opd.length_limit(pair) == 30


def test_no_length_limit_is_no_limit(store):
    pair = load(store)
    for model in (pair.student, pair.teacher):
        model.config = transformers.BloomConfig()
    assert opd.length_limit(pair) == math.inf


# ======================================================================================
# Prompts and answers
# ======================================================================================


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}"
    "{% if enable_thinking %}w9{% else %}w8{% endif %}"
)


@pytest.fixture(scope="session")
def chat(store):
    """A pair whose tokenizer adds <s> before a text and has a chat template."""
    tokenizer = tokenizer_of(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = TEMPLATE
    return load(store)._replace(tokenizer=tokenizer)


def read(tmp_path, pair, *records, max_new_tokens=6):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return opd.read_prompts(path, pair, max_new_tokens)


def message(content, role="w3"):  # w3, so that the role is a word of the vocabulary
    return {"role": role, "content": content}


def test_bos_is_added_once_whoever_brings_it(chat, tmp_path):
    chat.tokenizer.chat_template = "<s> " + TEMPLATE
    examples = read(
        tmp_path,
        chat,
        {"prompt": "w5 w6", "answer": "w7"},
        {"prompt": "<s> w5 w6"},
        {"messages": [message("w5 w6")]},
    )
    chat.tokenizer.chat_template = TEMPLATE
    assert examples == [
        {"prompt": [1, 5, 6], "answer": "w7"},
        {"prompt": [1, 5, 6], "answer": None},
        {"prompt": [1, 3, 5, 6, 8], "answer": None},
    ]


def test_an_eos_that_the_tokenizer_appends_is_taken_off_and_one_of_the_text_is_not(
    store, tmp_path
):
    # The student would write on after the end.
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    pair = load(store)._replace(tokenizer=tokenizer)
    assert tokenizer("w5").input_ids == [5, 0]
    (example,) = read(tmp_path, pair, {"prompt": "w5 w6"})
    assert example["prompt"] == [5, 6]

    pair.tokenizer.chat_template = TEMPLATE.replace("w8", "<eos>")
    (example,) = read(tmp_path, pair, {"messages": [message("w5")]})
    assert example["prompt"] == [3, 5, 0]


def test_the_template_is_given_the_records_tools_and_settings(chat, tmp_path):
    messages = [message("w5")]
    examples = read(
        tmp_path,
        chat,
        {"messages": messages},
        {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": messages, "chat_template_kwargs": None, "tools": None},
        {"messages": messages, "tools": [{"name": "w20"}]},
    )
    prompts = [example["prompt"] for example in examples]
    assert prompts == [[3, 5, 8], [3, 5, 9], [3, 5, 8], [3, 5, 20, 8]]


def test_keys_that_are_not_used_are_named_once(chat, tmp_path, capsys):
    records = [{"prompt": "w5", "tools": [], "system": "w6"}] * 3
    records.append({"messages": [message("w5")], "id": 7, "answer": "w9"})
    read(tmp_path, chat, *records)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("p.jsonl: these keys are not used: id, system, tools\n")


@pytest.mark.parametrize(
    "record,says",
    [
        ({"messages": [{"from": "human", "value": "w5"}]}, "`role` and `content`"),
        ({"messages": [message("w5"), message("w6", "assistant")]}, "the assistant's"),
        ({"messages": [[message("w5")]]}, "`role` and `content`"),
        ({"messages": None}, "`messages` must be a list"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "w5"}, "`messages` must be a list"),
        ({"messages": {"role": "user", "content": "w5"}}, "`messages` must be a list"),
        ({"messages": [message(None)]}, "has no `content`"),
        ({"messages": [{"role": "user"}]}, "has no `content`"),
        ({"messages": [message("w5")], "chat_template_kwargs": 5}, "TypeError"),
        ({"messages": [message("w5")], "prompt": "w5"}, "either `prompt` or"),
        ({"prompt": None}, "`prompt` must be a text"),
        ({"prompt": ["w5"]}, "`prompt` must be a text"),
        ({"prompt": [message("w5")]}, "`prompt` must be a text"),
        ({"prompt": "w5", "answer": True}, "`answer` must be"),
        ({"prompt": "w5", "answer": ["w5"]}, "`answer` must be"),
        ({"prompt": "w5", "answer": " "}, "empty answer"),
        ({"prompt": "w5", "answer": ""}, "empty answer"),
        ({"prompt": "w5", "answer": "."}, "empty answer"),
        ({"prompt": "w5", "answer": "**"}, "empty answer"),
    ],
)
def test_a_record_that_would_be_misread_is_refused_with_its_line(
    chat, tmp_path, record, says
):
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: .*{says}"):
        read(tmp_path, chat, {"prompt": "w5"}, record)


def test_a_token_that_only_one_model_knows_is_refused_with_its_line(store, tmp_path):
    pair = load(store)._replace(tokenizer=with_added("<think>"))
    with pytest.raises(ValueError, match="line 2: .* does not know '<think>'"):
        read(tmp_path, pair, {"prompt": "w5"}, {"prompt": "w5 <think> w6"})


def test_a_prompt_and_its_response_may_just_fill_the_models_length(store, tmp_path):
    # 64 in all, and 6 for the response.
    record = {"prompt": " ".join(["w5"] * 58)}
    (example,) = read(tmp_path, load(store), record)
    assert len(example["prompt"]) == 58
    record["prompt"] += " w5"
    with pytest.raises(ValueError, match="line 1: .* 59 tokens; .* 6 .* the 64 that"):
        read(tmp_path, load(store), record)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_not_matter(
    store, tmp_path
):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "w5"}\r\n\r\n{"prompt": "w6"}\r\n')
    examples = opd.read_prompts(path, load(store), 6)
    assert [example["prompt"] for example in examples] == [[5], [6]]


def test_answers_may_be_json_numbers(store, tmp_path):
    records = [{"prompt": "w5", "answer": answer} for answer in (7, 0.5, 1e-7, 0)]
    examples = read(tmp_path, load(store), *records)
    for example, response in zip(examples, ("is 7.", "1/2", "0.0000001", "-0")):
        assert opd.is_right(response, example["answer"])


def test_that_an_answer_has_several_numbers_is_said_once(store, tmp_path, capsys):
    pair = load(store)
    capsys.readouterr()
    records = [{"prompt": "w5", "answer": answer} for answer in ("7", "3/4", "1 234")]
    read(tmp_path, pair, *records)
    assert capsys.readouterr().err == ""
    records += [{"prompt": "w5", "answer": "(3, 4)"}] * 2
    read(tmp_path, pair, *records)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "p.jsonl, line 4: the answer has several numbers" in error


@pytest.mark.parametrize(
    "response,answer,right",
    [
        # one number: the last number of the response must be equal
        ("First 7, then 9.", "9", True),
        ("9 or 10", "9", False),
        ("no number at all", "9", False),
        ("", "9", False),
        ("nine 9s", "9", True),
        ("So it makes 1,234.", "1234", True),
        ("1 234", "1234", True),
        ("1234", "1 234", True),
        ("1\u00a0234\u202f567", "1234567", True),
        ("12,34", "1234", False),
        ("1, 234", "1234", False),
        ("1,2345", "12345", False),
        (r"\boxed{42}", "42", True),
        ("$42$", "42", True),
        ("**42**", "42", True),
        ("42", "$42$.", True),
        ("0.50 litres", "0.5", True),
        (".5", "0.5", True),
        ("0.5", ".5", True),
        ("5", ".5", False),
        (".5", "5", False),
        ("1.5", "5", False),
        ("from 5 to -3", "-3", True),
        ("from 5 to 3", "-3", False),
        ("from 5 to -3", "3", False),
        ("\u22125", "-5", True),
        ("-5", "\u22125", True),
        ("5", "\u22125", False),
        ("\u22125", "5", False),
        ("+5", "5", True),
        ("5-3", "3", True),
        ("3/4", "3/4", True),
        ("6/8", "3/4", True),
        ("0.75", "3/4", True),
        ("1/4", "3/4", False),
        ("4", "3/4", False),
        ("3/4", "4", False),
        ("-1/2", "1/2", False),
        ("1/2", "-1/2", False),
        ("-1/2", "-1/2", True),
        ("1/0", "1", False),
        ("1", "1/0", False),
        ("1/0", "1/0", True),  # as a word
        ("1e5", "100000", True),
        ("1e-5", "1e5", False),
        ("1e5", "1e-5", False),
        ("1e-5", "0.00001", True),
        ("5", "1e5", False),
        ("gpt4", "4", False),
        ("version 1.2.3", "3", False),
        # any other answer: the last words of the response must be its words
        ("It is Paris.", "Paris", True),
        ("It is **Paris**", "Paris", True),
        ("It is Paris", "**Paris**.", True),
        ("Paris is large", "Paris", False),
        ("", "Paris", False),
        ("the answer is (B)", "B", True),
        ("the answer is B.", "(B)", True),
        ("So it is NASA", "A", False),
        ("So it is A", "NASA", False),
        ("a casino", "no", False),
        ("no", "no", True),
        ("at 12:30", "11:30", False),
        ("at 11:30.", "11:30", True),
        ("(1, 4)", "(3, 4)", False),
        ("(3, 4)", "(3, 4)", True),
        ("Gemini 11", "Apollo 11", False),
        ("It was Apollo 11.", "Apollo 11", True),
        ("11", "Apollo 11", False),
        ("New\nYork", "New York", True),
        ("York", "New York", False),
    ],
)
def test_an_answer_is_compared_as_a_number_if_it_is_one_and_else_as_last_words(
    response, answer, right
):
    assert opd.is_right(response, answer) is right


# ======================================================================================
# Bad input
# ======================================================================================


@pytest.mark.parametrize(
    "more,says",
    [
        ("--budget 0", "above 0"),
        ("--budget 1.5", r"in \(0, 1\]"),
        ("--budget nan", "above 0"),
        ("--top-k 0", "1 or more"),
        ("--temperature 0", "above 0"),
        ("--temperature inf", "above 0"),
        ("--select best", "teachability"),
        ("--loss kl", "reverse_kl"),
        ("--steps 0", "1 or more"),
        ("--save-every 0", "1 or more"),
        ("--eval-prompts 0", "1 or more"),
        ("--micro-batch-size 0", "1 or more"),
        ("--max-new-tokens -1", "1 or more"),
        ("--lr -1", "above 0"),
        ("--batch-size x", "int"),
        ("--seed -3", "from 0 to 2147483647"),
        ("--seed 2147483648", "from 0 to 2147483647"),
        ("--frobnicate", ""),
    ],
)
def test_a_bad_flag_gets_one_line_that_names_it(store, tmp_path, capsys, more, says):
    with one_line(capsys, f"^error: .*{more.split()[0]}.*{says}"):
        opd.parse_args(flags(store, tmp_path / "out", *more.split()))


@pytest.mark.parametrize("given", ["--student x", "--teacher x --prompts y"])
def test_half_a_pair_is_refused(capsys, given):
    with one_line(capsys, "--student, --teacher and --prompts go together"):
        opd.parse_args(given.split())


@pytest.mark.parametrize(
    "content,says",
    [
        ("", "0 prompts; --batch-size and --eval-prompts need 8"),
        ('{"prompt": "w5"}\n' * 7, "7 prompts"),
        ('{"prompt": "w5"}\nnot json\n', "line 2: JSONDecodeError"),
        ("[1]\n", "line 1: give an object"),
        ('{"text": "w5"}\n', "line 1: give an object"),
        ('{"prompt": 5}\n', "line 1: `prompt` must be a text"),
        ('{"prompt": "w5"}\n{"prompt": ""}\n', "line 2: the prompt has no token"),
        (json.dumps({"prompt": "w5 " * 60}) + "\n", "line 1: .* 60 tokens"),
        (b"\xff\xfe", "UTF-16"),
        ('{"prompt": "w5"}\n'.encode("utf-16"), "UTF-16"),
        (gzip.compress(b'{"prompt": "w5"}\n'), "compressed"),
        (
            '{"messages": [{"role": "user", "content": "w5"}]}\n',
            "line 1: .*chat.?template",
        ),
        ('{"prompt": "w5", "answer": " "}\n', "line 1: empty answer"),
    ],
)
def test_bad_prompts_get_one_line_with_the_place_and_leave_nothing(
    run, tmp_path, content, says, capsys
):
    if isinstance(content, str):
        content = content.encode()
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with one_line(capsys, f"^error: .*{path}.*{says}"):
        opd.run(run, "out", "--prompts", path)
    assert not (tmp_path / "out").exists()


def test_missing_paths_get_one_line_that_names_flag_and_path(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for flag, path in (
        ("--student", tmp_path / "none"),
        ("--teacher", tmp_path / "file"),
        ("--prompts", "none.jsonl"),
        ("--prompts", tmp_path),
        ("--out", tmp_path / "file" / "out"),
        ("--out", tmp_path / "file"),
        ("--resume", tmp_path / "none"),
    ):
        with one_line(capsys, f"^error: {flag} {path}"):
            opd.run(run, "out", flag, path)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_gets_one_line_that_names_it(run, capsys, device):
    with one_line(capsys, f"^error: --student .* on {device}: "):
        opd.run(run, "out", "--device", device)


# ======================================================================================
# The terminal
# ======================================================================================


def accented_pair(folder):
    """A model whose words are written with a letter that ASCII and Latin-1 lack."""
    words = {"<eos>": 0}
    for i in range(1, V):
        words[f"ŵ{i}"] = i
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>"
    )
    lines = [json.dumps({"prompt": f"ŵ{3 + i}"}) + "\n" for i in range(12)]
    (folder / "p.jsonl").write_text("".join(lines))
    model = put(folder / "m", model_of("qwen3"), tokenizer)
    return ["--student", model, "--teacher", model, "--prompts", folder / "p.jsonl"]


@pytest.mark.parametrize(
    "encoding,shown", [("ascii", "?5"), ("latin-1", "?5"), ("utf-8", "ŵ5")]
)
def test_a_terminal_that_lacks_a_letter_shows_another_and_all_files_are_there(
    run, tmp_path, monkeypatch, encoding, shown
):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # strict
    more = accented_pair(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        opd.run(run, "out", *more, "--steps", 1)
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    sample = re.search(r"^sample: .*", printed, re.M)[0]
    assert shown[0] + "11" in sample  # the first of the held-out prompts
    assert "held-out prompts" in printed
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.jsonl", "student", "summary.json"]


def test_a_reader_of_the_first_line_alone_does_not_end_the_training(store, tmp_path):
    program = [sys.executable, HERE / "opd.py", *flags(store, tmp_path / "out")]
    line = " ".join(map(str, program)) + " | head -1; echo ${PIPESTATUS[0]}"
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=100
    )
    sample, status = result.stdout.splitlines()
    assert sample.startswith("sample: ")
    assert status == "0"
    assert "Exception" not in result.stderr and "Traceback" not in result.stderr
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert log.count("\n") == 3
    assert weights_of(tmp_path / "out" / "student")
    assert summary_of(tmp_path / "out")["after"]


@pytest.mark.parametrize(
    "error,status,says",
    [
        (ValueError("no such\nthing"), 2, "thing"),
        (OSError("disk"), 1, "disk"),
        (FloatingPointError("step 3"), 1, "step 3"),
        (torch.OutOfMemoryError("2 GiB"), 1, "--micro-batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_stops_the_program_from_outside_gets_a_line_and_a_status(
    capsys, error, status, says
):
    def program():
        raise error

    with one_line(capsys, says, status):
        opd.run(program)


def test_a_fault_of_the_programs_own_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        opd.run(lambda: 1 / 0)


# ======================================================================================
# The demo
# ======================================================================================


def test_the_problems_of_the_demo_add_up_unless_their_writer_slips():
    clock = list(range(1, 25)) * 2
    wrong = Counter()
    for seed in range(400):
        dice = random.Random(seed)
        start = dice.randint(1, 24)
        step = dice.randint(2, 9)
        for slips in (0.0, 0.7):
            prompt, response, answer = opd.problem("bus", start, step, dice, slips)
            assert prompt == f"A bus starts at {start} and returns every {step} hours:"
            pattern = r"(\w+) \w+ adds (\d+) to (\d+) and gets (\d+)\."
            sums = re.findall(pattern, response)
            ordinals = [ordinal for ordinal, *_ in sums]
            assert ordinals == ["First", "Second", "Third", "Fourth"]
            hour = start
            for _, added, before, total in sums:
                assert (int(added), int(before)) == (step, hour)
                right = clock[hour + step - 1]
                hour = int(total)
                assert hour in (right, clock[right])  # at most one too high
                wrong[slips] += hour != right
            assert response.endswith(f" So it ends at {hour}.")
            assert int(answer) == clock[clock[start + 2 * step - 1] + 2 * step - 1]
            assert slips or opd.is_right(response, answer)
    assert wrong[0.0] == 0
    assert 0.25 < wrong[0.7] / 1600 < 0.45  # 0.7 of the hard half


def test_the_house_style_is_a_matter_of_one_word():
    _, plain, answer = opd.problem("bus", 5, 7, random.Random(0), style=0)
    _, house, same = opd.problem("bus", 5, 7, random.Random(0), style=1)
    assert house.count("obtains") == 4
    assert house.replace("obtains", "gets") == plain
    assert answer == same == "9"  # 5 + 28 = 33, and 33 - 24 = 9
    assert opd.is_right(plain, answer)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the demo's pair, after two steps of training for each model."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(opd, "tqdm", lambda steps, **_: list(steps)[:2])

        with patch.context() as stopped:
            stopped.setattr(Path, "write_text", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opd.build_pair()
        assert not opd.PAIR.exists()

        opd.check_demo()
    return folder


def test_the_demo_is_built_once_and_an_interrupted_build_is_not_mistaken_for_one(
    world, monkeypatch
):
    monkeypatch.chdir(world)
    monkeypatch.setattr(opd, "ByteLevelBPETokenizer", interrupted)  # not again
    pair, training, held_out = opd.prepare(opd.parse_args([]))
    assert len(training) == 576
    assert len(held_out) == 192

    cases = []
    for example in training + held_out:
        text = pair.tokenizer.decode(example["prompt"])
        cases.append(tuple(re.findall(r"\d+", text)))
    assert len(set(cases)) == 192  # four things for every sum
    assert not set(cases[:576]) & set(cases[576:])
    for word in ("gets", "obtains", *map(str, range(1, 25))):
        assert len(pair.tokenizer.tokenize(" " + word)) == 1


@pytest.mark.parametrize("part", ["student", "teacher", "prompts.jsonl", "world"])
def test_a_pair_that_lacks_a_part_gets_a_line_that_says_to_delete_it(
    world, tmp_path, monkeypatch, capsys, part
):
    # Also that of an earlier version, which had no mark of its world.
    shutil.copytree(world / opd.PAIR, tmp_path / opd.PAIR)
    (tmp_path / opd.PAIR / part).rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with one_line(capsys, f"^error: {opd.PAIR} has no {part}: delete the folder"):
        opd.run(opd.main, opd.parse_args([]))
    assert not Path("runs/opd-1").exists()


def test_a_pair_of_another_version_gets_a_line_that_says_to_delete_it(
    world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / opd.PAIR, tmp_path / opd.PAIR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opd, "problem", lambda thing: thing)  # other code, other world
    with one_line(capsys, f"^error: {opd.PAIR} was built by another version.*delete"):
        opd.run(opd.main, opd.parse_args([]))


def test_the_demos_settings_hold_without_a_pair_and_give_way_to_flags():
    args = opd.parse_args(["--steps", "7"])
    assert (args.steps, args.lr, args.batch_size) == (7, 3e-4, 12)
    args = opd.parse_args("--student a --teacher b --prompts c".split())
    assert (args.steps, args.lr, args.batch_size) == (200, 1e-6, 8)
