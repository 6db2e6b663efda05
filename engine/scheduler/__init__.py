"""A leader's loop: receive, plan, agree, launch, commit. Decides; holds no tensor."""
