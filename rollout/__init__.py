"""The main job: multi-turn rollouts with their routes, and the report of them. A server needs none of it."""
