#!/usr/bin/env bash
# Waybill on this machine: sets up .venv on first use, then runs one rank per device under torchrun.
#   ./torchrun.sh                               the main job: multi-turn rollouts with their routes, on two ranks
#   ./torchrun.sh rollout --model PATH --tp 2 --conversations 8 --turns 4 --json
#   ./torchrun.sh serve --model PATH --tp 2 --port 30000 --enable-return-routed-experts     the HTTP service
#   ./torchrun.sh serve --dp 2 --tp 8 --nnodes 2 --node-rank K --rdzv-endpoint HOST:PORT    one call on each node
#   ./torchrun.sh route --prefill URL PORT --decode URL  one address before servers for prompts and for what follows
#   ./torchrun.sh encode --model PATH --port 31000       encodes images for servers with --encoder HOST:PORT
#   ./torchrun.sh [rollout | serve | route | encode] --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$root/scripts/venv.sh"
exec "$root/.venv/bin/python" -m waybill.launch.process waybill.launch.command_line "$@"
