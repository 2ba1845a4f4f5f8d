"""The trained model as a Hugging Face folder, with the record of where it came from."""
