"""Where models come from: their names, the Hugging Face Hub, and their files and sizes, looked at before loading."""
