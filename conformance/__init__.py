"""The published rules of routed experts, run against any server of sglang's dialect: `python -m waybill.conformance URL`.

Speaks HTTP alone: `/generate` with token ids, and `/pause_generation`, `/continue_generation`, `/abort_request` where a
rule needs them. Needs neither torch nor a tokenizer.
"""
