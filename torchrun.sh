#!/usr/bin/env bash
# Waybill on this machine: sets up .venv on first use, then runs one rank per device under torchrun.
#   ./torchrun.sh                               the main job: multi-turn rollouts with their routes, on two ranks
#   ./torchrun.sh rollout --model PATH --tp 2 --conversations 8 --turns 4 --json
#   ./torchrun.sh serve --model PATH --tp 2 --port 30000 --enable-return-routed-experts     the HTTP service
#   ./torchrun.sh --nnodes 2 --node-rank 0 --rdzv-endpoint HOST:PORT rollout ...      one call per node
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$root/scripts/venv.sh"

nnodes=1 node_rank=0 rdzv_endpoint="" tp=2 dp=1
args=()
while (($#)); do
  case $1 in
    --nnodes | --node-rank | --rdzv-endpoint | --tp | --dp)
      (($# > 1)) || { echo "torchrun.sh: $1: needs a value" >&2; exit 2; }
      case $1 in
        --nnodes) nnodes=$2 ;;
        --node-rank) node_rank=$2 ;;
        --rdzv-endpoint) rdzv_endpoint=$2 ;;
        --tp) tp=$2; args+=(--tp "$tp") ;;
        --dp) dp=$2; args+=(--dp "$dp") ;;
      esac
      shift 2 ;;
    --tp=*) tp=${1#--tp=}; args+=(--tp "$tp"); shift ;;
    --dp=*) dp=${1#--dp=}; args+=(--dp "$dp"); shift ;;
    *) args+=("$1"); shift ;;
  esac
done
((${#args[@]})) && [[ ${args[0]} != --* ]] || args=(rollout "${args[@]}")
case " ${args[*]} " in
  *" -h "* | *" --help "*) exec "$root/.venv/bin/python" -m waybill.launch.worker "${args[@]}" ;;
esac
for size in "tp $tp" "dp $dp" "nnodes $nnodes"; do
  [[ ${size#* } =~ ^[1-9][0-9]*$ ]] || { echo "torchrun.sh: --$size: must be a number of at least 1" >&2; exit 2; }
done
world=$((dp * tp))
((world % nnodes == 0)) || { echo "torchrun.sh: --dp $dp times --tp $tp: must be a multiple of --nnodes $nnodes" >&2; exit 2; }

if [[ -n $rdzv_endpoint ]]; then
  rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --rdzv-backend c10d --rdzv-endpoint "$rdzv_endpoint")
else
  rendezvous=(--standalone)
fi
ranks_here=$((world / nnodes))
threads=$(($(nproc) / ranks_here))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# A mistake on the command line is said once, before any rank starts.
"$root/.venv/bin/python" -m waybill.launch.args "${args[@]}"
exec "$root/.venv/bin/python" -m waybill.launch.agent "${rendezvous[@]}" --nproc-per-node "$ranks_here" \
  -m waybill.launch.worker "${args[@]}"
