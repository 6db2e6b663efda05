#!/usr/bin/env bash
# A whole reinforcement-learning loop on this machine: rollouts by the engine on two ranks, a DeepSpeed trainer on two
# ranks that replays their routes, and new weights back into the engine after every step. Sets itself up on first use and trains
# the model it starts from (an early stop of the embedded one, some minutes).
#   ./examples/grpo/run.sh                       60 steps
#   ./examples/grpo/run.sh --steps 100 --seed 1 --no-replay
#   ./examples/grpo/run.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
"$root/scripts/venv.sh"
python=$root/.venv/bin/python
start=$root/models/early
case " $* " in *" -h "* | *" --help "*) exec "$python" "$root/examples/grpo/options.py" "$@" ;; esac
# Refuses what is illegal before anything starts.
model=$("$python" "$root/examples/grpo/options.py" "$@")
if [[ $model == "$start" && ! -f $start/model.safetensors ]]; then
  echo "training the model to start from, in $start ..." >&2
  "$python" "$root/examples/tiny_moe/train.py" --out "$start" --stop-early 0.2 --dialogues 50
fi
# What the libraries say of their own future helps nobody here.
export PYTHONWARNINGS=ignore::FutureWarning TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
# Two trainer ranks and two engine ranks share the cores; each is alone for most of the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$root/examples/grpo/train.py" "$@"
