"""What the model is for: specification, phrase banks, prompt, parsing and scoring. Imports nothing else of ours."""
