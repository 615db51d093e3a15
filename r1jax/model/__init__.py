"""The policy: one decoder for DeepSeek-V3, Qwen 2/2.5/3 and Llama 3."""
