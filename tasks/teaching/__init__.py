"""What the stage `teach` is made of: prompts, the log of answers, asking within a budget, validators."""
