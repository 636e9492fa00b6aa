"""The rank search: gates, their distribution, the space around a starting plan, and the alternation."""
