"""From a prepared model and a budget to a plan: what widths cost, what they are worth, and the choice."""
