"""Gates: how the budget is spent."""
