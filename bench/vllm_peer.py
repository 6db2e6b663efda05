"""vLLM as a benchmark's other side, run by vLLM's own Python: one JSON object a line on standard input, `{"prompts":
[[id]], "num_new": n}`, and an empty line on the file descriptor that the command line gives when it is ready, or done.
Nothing of this project is imported.

    PYTHON_OF_VLLM bench/vllm_peer.py FD MODEL TP_SIZE MAX_RUNNING MAX_LENGTH
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # noqa: PLC0415

    done, model, tp_size, max_running, max_length = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    # Compiled, which is its default and its best; prefixes are not cached, as every prompt is new.
    llm = LLM(
        model=model,
        dtype="bfloat16",
        tensor_parallel_size=tp_size,
        max_num_seqs=max_running,
        max_model_len=max_length,
        max_num_batched_tokens=max_length,
        enable_prefix_caching=False,
        seed=0,
    )
    os.write(done, b"\n")
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=job["num_new"], ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == job["num_new"] for output in outputs)
        os.write(done, b"\n")


if __name__ == "__main__":
    main()
