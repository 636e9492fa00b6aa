"""Learning a concept: photos and class images, the objective of each family, and the run."""
