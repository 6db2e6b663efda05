"""Token ids to text as they come, by the decoders of the tokenizer itself."""
