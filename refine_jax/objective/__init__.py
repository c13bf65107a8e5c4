"""What a step minimises: noise, rounds, weights; what validation says of blocks. No model here."""
