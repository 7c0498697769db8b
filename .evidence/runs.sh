#!/usr/bin/env bash
# All runs behind section 4 of the README, two at a time with one thread each, and their tables.
# Called again after an interruption, it goes on with the runs that are not finished.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

train() {  # method budget seed flags: the command line, unless that run is finished
  out=$base/${folder:-evidence}/$1-$2-$3
  [ -e $out/summary.json ] || echo "rm -rf $out; python opd.py --select $1 --budget $2 --seed $3 $4 --out $out"
}
diagnose() {  # seed of the trained student, flags
  out=$base/diagnoses/$1
  [ -e $out/report.html ] ||
    echo "rm -rf $out; python diagnose.py $2 --after $base/evidence/full-1-$1/student --out $out"
}
embedded_runs() {
  for seed in 0 1 2 3 4; do train full 1 $seed ""
    for method in teachability teachability_entropy entropy divergence tip compatibility incompatible random; do
      for budget in 0.1 $([ $seed -gt 1 ] || echo 0.03 0.05 0.3); do train $method $budget $seed ""; done
    done
  done
  folder=late
  train full 1 0 "--steps 400"
  train teachability 0.1 0 "--steps 400"
}
embedded_diagnoses() { for seed in 0 1 2 3 4; do diagnose $seed "--seed $seed"; done; }

pair="--student runs/real/student --teacher runs/real/teacher --batch-size 4 --max-new-tokens 48"
real_runs() {
  flags="$pair --prompts runs/real/prompts.jsonl --lr 2e-5 --steps 40"
  for seed in 0 1 2; do train full 1 $seed "$flags"
    for method in teachability teachability_entropy entropy divergence tip incompatible random; do
      train $method 0.1 $seed "$flags"
    done
    for budget in 0.03 0.05 0.3; do train teachability $budget $seed "$flags"; done
  done
}
real_diagnoses() {  # the same contexts for all
  for seed in 0 1 2; do diagnose $seed "$pair --prompts runs/real/contexts.jsonl --eval-prompts 300"; done
}

case ${1:-} in
  embedded) base=runs; [ -e runs/pair ] || python opd.py --steps 1 ;;
  real) base=runs/real; [ -e runs/real/contexts.jsonl ] || python .evidence/real_pair.py ;;
  *) echo "usage: bash .evidence/runs.sh embedded|real" >&2; exit 2 ;;
esac
for part in runs diagnoses; do
  $1_$part | tr '\n' '\0' | xargs -0 -r -n 1 -P 2 bash -c > /dev/null
done
python diagnose.py --compare $base/evidence/*
if [ $1 = embedded ]; then
  python diagnose.py --compare runs/late/*
  python .evidence/house_word.py runs/late/*/student runs/evidence/{full-1,teachability-0.1}-0/student
fi
python .evidence/tables.py $base/diagnoses/*
