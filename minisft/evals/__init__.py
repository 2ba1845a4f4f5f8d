"""What a trained model says, and how it is measured."""
