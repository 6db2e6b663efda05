"""Images in prompts, as frontend, leaders and ranks know them: places, positions, and the memory that they share."""
