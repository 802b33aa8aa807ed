"""Training-aware architecture search (section 3.3 of the paper): space, trial, search, scaling."""
