"""What the methods of one family share, on tensors alone; what needs sites, steps or prompts is `recipes/kit`'s."""
