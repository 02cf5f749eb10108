"""What cellmap-inspect does: facts about volumes and crops, what is wrong with them, and a proposal."""
