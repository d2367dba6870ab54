"""What clients of OpenAI's and vLLM's libraries call: routes under `/v1/`, and `/tokenize`."""
