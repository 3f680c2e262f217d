"""Contrastive fine-tuning: batches, loss, adapters, the loop and its checkpoints."""
