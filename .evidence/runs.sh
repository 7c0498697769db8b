#!/usr/bin/env bash
# All runs behind the README's evidence, two at a time with one thread each, and tables.
# Called again after an interruption, it goes on with the runs that are not finished.
#
#   bash .evidence/runs.sh embedded    the demo's pair: all methods
#   bash .evidence/runs.sh ends        the same, with a teacher that ends in its own way
#   bash .evidence/runs.sh real        SmolLM2 and its pruned student: reverse KL
#   bash .evidence/runs.sh questions   the same: right answers to short questions

set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

# The functions print command lines, one for each run that is not finished yet. What an
# interrupted run has left behind is removed first, since --out must be empty.

train() {  # folder, method, budget, seed, more flags
  local out=$base/$1/$2-$3-$4
  if [ ! -e $out/summary.json ]; then
    echo "rm -rf $out; python opd.py --select $2 --budget $3 --seed $4 $5 --out $out"
  fi
}

diagnose() {  # seed of the run with full OPD whose student is diagnosed, more flags
  local out=$base/diagnoses/$1
  local student=$base/evidence/full-1-$1/student
  if [ ! -e $out/report.html ]; then
    echo "rm -rf $out; python diagnose.py $2 --after $student --out $out"
  fi
}

# The embedded pair: all methods at 10 % with five seeds, at other budgets with two.

embedded_methods="teachability teachability_entropy entropy divergence tip"
embedded_methods+=" compatibility incompatible random"

embedded_runs() {
  for seed in 0 1 2 3 4; do
    train evidence full 1 $seed ""
    budgets="0.1"
    if [ $seed -le 1 ]; then
      budgets="0.1 0.03 0.05 0.3"
    fi
    for method in $embedded_methods; do
      for budget in $budgets; do
        train evidence $method $budget $seed ""
      done
    done
  done

  # Other learning rates than the demo's 3e-4.
  for rate in 1.5e-4 6e-4 1e-3; do
    for seed in 0 1 2; do
      train rate-$rate full 1 $seed "--lr $rate"
      train rate-$rate teachability 0.1 $seed "--lr $rate"
    done
  done

  train late full 1 0 "--steps 400"
  train late teachability 0.1 0 "--steps 400"
}

embedded_diagnoses() {
  for seed in 0 1 2 3 4; do
    diagnose $seed "--seed $seed"
  done
}

# The real pair, three seeds: the methods at 10 %, teachability at other budgets, too.

real_methods="teachability teachability_entropy entropy divergence tip"
real_methods+=" incompatible random"
pair="--student runs/real/student --teacher runs/real/teacher"
pair+=" --batch-size 4 --max-new-tokens 48"

real_runs() {
  flags="$pair --prompts runs/real/prompts.jsonl --lr 2e-5 --steps 40"
  for seed in 0 1 2; do
    train evidence full 1 $seed "$flags"
    for method in $real_methods; do
      train evidence $method 0.1 $seed "$flags"
    done
    for budget in 0.03 0.05 0.3; do
      train evidence teachability $budget $seed "$flags"
    done
  done
}

real_diagnoses() {
  flags="$pair --prompts runs/real/contexts.jsonl --eval-prompts 300 --contexts 300"
  for seed in 0 1 2; do
    diagnose $seed "$flags --seed $seed"
  done
}

# The same pair, three seeds: short questions, so that there are right answers to count.

questions_runs() {
  flags="--student runs/real/student --teacher runs/real/teacher"
  flags+=" --prompts runs/real/questions.jsonl --eval-prompts 200 --temperature 0.5"
  flags+=" --batch-size 4 --max-new-tokens 8 --lr 5e-5 --steps 24"
  for seed in 0 1 2; do
    train questions full 1 $seed "$flags"
    for method in teachability random divergence entropy; do
      train questions $method 0.1 $seed "$flags"
    done
  done
}

questions_diagnoses() { :; }

# The demo's pair with a teacher that ends in its own way, five seeds.

ends_runs() {
  for seed in 0 1 2 3 4; do
    for how in apart together; do
      if [ ! -e runs/ends/$how-$seed/summary.json ]; then
        echo "rm -rf runs/ends/$how-$seed; python .evidence/end_ids.py $how $seed"
      fi
    done
  done
}

ends_diagnoses() { :; }

# Build the models that are missing, run what is missing, print the tables.

case ${1:-} in
  embedded | ends)
    base=runs
    if [ ! -e runs/pair ]; then
      python opd.py --steps 1
    fi
    if [ $1 = ends ]; then
      python .evidence/end_ids.py build
    fi
    ;;
  real | questions)
    base=runs/real
    if [ ! -e runs/real/contexts.jsonl ]; then
      python .evidence/real_pair.py
      python .evidence/real_questions.py
    fi
    ;;
  *)
    echo "usage: bash .evidence/runs.sh embedded|ends|real|questions" >&2
    exit 2
    ;;
esac

for part in runs diagnoses; do
  $1_$part | tr '\n' '\0' | xargs -0 -r -n 1 -P ${JOBS:-2} bash -c > /dev/null
done

case $1 in
  embedded)
    python .evidence/compare.py runs/evidence/*
    python .evidence/compare.py runs/rate-*/*
    python .evidence/compare.py runs/late/*
    python .evidence/house_word.py runs/rate-1e-3/*/student runs/late/*/student \
      runs/evidence/full-1-0/student runs/evidence/teachability-0.1-0/student
    python .evidence/tables.py runs/diagnoses/*
    ;;
  ends) python .evidence/end_ids.py ;;
  real)
    python .evidence/compare.py runs/real/evidence/*
    python .evidence/tables.py runs/real/diagnoses/*
    ;;
  questions) python .evidence/compare.py runs/real/questions/* ;;
esac
