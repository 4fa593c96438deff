"""Everything that is kept: storage, run directories, checkpoints and their checksums."""
