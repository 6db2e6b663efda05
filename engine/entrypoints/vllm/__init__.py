"""vLLM's dialect, as far as trainers speak it: control, tokens in and tokens out, and the server that TRL brings."""
