"""TFDS builders for data sets that TFDS lacks; importing a module registers its builder."""
