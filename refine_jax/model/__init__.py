"""The causal decoder as pure functions: parameters in, hidden states, loss and logits out."""
