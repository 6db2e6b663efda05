"""Model families from their Hugging Face folders, behind the `CausalLM` protocol."""
