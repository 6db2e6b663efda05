"""Images in prompts: the process that encodes them, and what frontend, leaders and ranks know of them."""
