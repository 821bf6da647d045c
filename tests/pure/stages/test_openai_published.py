"""What real servers were seen to answer, and how we read it.

The bodies have the fields their sources show, with ids and texts shortened; where a source shows fields only (code, a
table), the values are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.job import Json
from stages.openai_protocol import Answer, Failure, read_response

# Source: KAITO (vLLM 0.10), website/docs/gateway-api-inference-extension.md, "curl ... /v1/chat/completions".
VLLM = b"""{"choices": [{"finish_reason": "length", "index": 0, "logprobs": null, "message": {"annotations": null,
"audio": null, "content": "Kubernetes, often abbreviated as K8s, is", "function_call": null, "reasoning_content": null,
"refusal": null, "role": "assistant", "tool_calls": []}, "stop_reason": null}], "created": 1756235005,
"id": "chatcmpl-e0a3", "kv_transfer_params": null, "model": "phi-4-mini-instruct", "object": "chat.completion",
"prompt_logprobs": null, "service_tier": null, "system_fingerprint": null, "usage": {"completion_tokens": 50,
"prompt_tokens": 17, "prompt_tokens_details": null, "total_tokens": 67}}"""

# Source: docs.vllm.ai v0.8.3, features/reasoning_outputs; fields as in triton-inference-server/perf_analyzer#433.
VLLM_REASONING = b"""{"id": "chatcmpl-8e0d", "object": "chat.completion", "created": 1755146543,
"model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "choices": [{"index": 0, "message": {"role": "assistant",
"reasoning_content": "9.11 has two decimals, 9.8 has one.", "content": "9.8 is greater.", "tool_calls": []},
"logprobs": null, "finish_reason": "stop", "stop_reason": null}], "usage": {"prompt_tokens": 12, "total_tokens": 90,
"completion_tokens": 78, "prompt_tokens_details": null}, "prompt_logprobs": null}"""

# Source: vLLM's ChatMessage (entrypoints/openai/protocol): content is null while a reasoning parser has met no answer.
VLLM_STILL_THINKING = b"""{"id": "chatcmpl-1", "object": "chat.completion", "created": 1755146544, "model": "r1",
"choices": [{"index": 0, "message": {"role": "assistant", "reasoning_content": "Let me see", "content": null,
"tool_calls": []}, "logprobs": null, "finish_reason": "length", "stop_reason": null}],
"usage": {"prompt_tokens": 12, "total_tokens": 20, "completion_tokens": 8}, "prompt_logprobs": null}"""

# Source: a vLLM answer with a tool call, IBM granite function-calling tutorial.
VLLM_TOOL_CALL = b"""{"id": "chatcmpl-d19a", "object": "chat.completion", "created": 1756821450, "model": "granite",
"choices": [{"index": 0, "message": {"role": "assistant", "content": null, "tool_calls": [{"id": "chatcmpl-tool-0d0a",
"type": "function", "function": {"name": "get_current_weather", "arguments": "{\\"location\\": \\"Boston\\"}"}}]},
"logprobs": null, "finish_reason": "tool_calls", "stop_reason": null}], "usage": {"prompt_tokens": 422,
"total_tokens": 447, "completion_tokens": 25, "prompt_tokens_details": null}, "prompt_logprobs": null}"""

# Source: ollama/ollama#5312.
OLLAMA = b"""{"id": "chatcmpl-20", "object": "chat.completion", "created": 1719437652, "model": "llama3",
"system_fingerprint": "fp_ollama", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"},
"finish_reason": "length"}], "usage": {"prompt_tokens": 23, "completion_tokens": 1, "total_tokens": 24}}"""

# Source: ollama/ollama openai/openai.go (Message.Reasoning); empty content as in ollama/ollama#15288.
OLLAMA_STILL_THINKING = b"""{"id": "chatcmpl-308", "object": "chat.completion", "created": 1777529963,
"model": "gemma4:26b", "system_fingerprint": "fp_ollama", "choices": [{"index": 0, "message": {"role": "assistant",
"content": "", "reasoning": "The user is asking for the capital of Australia."}, "finish_reason": "length"}],
"usage": {"prompt_tokens": 18, "completion_tokens": 50, "total_tokens": 68}}"""

# Source: ggml-org/llama.cpp#15443 (envelope), tools/server/README.md "Timings and context usage" (timings).
LLAMA_CPP = b"""{"choices": [{"finish_reason": "stop", "index": 0, "message": {"role": "assistant",
"content": "A llama is an animal."}}], "created": 1755667673, "model": "LiquidAI/LFM2-1.2",
"system_fingerprint": "b6210-a094f381", "object": "chat.completion", "usage": {"completion_tokens": 11,
"prompt_tokens": 14, "total_tokens": 25}, "id": "chatcmpl-DwWJ", "timings": {"cache_n": 0, "prompt_n": 14,
"prompt_ms": 53.734, "prompt_per_token_ms": 3.838142857142857, "prompt_per_second": 260.54, "predicted_n": 11,
"predicted_ms": 87.1, "predicted_per_token_ms": 7.918, "predicted_per_second": 126.29}}"""

# Source: OpenAI API reference, the chat completion object.
OPENAI = b"""{"id": "chatcmpl-B9MB", "object": "chat.completion", "created": 1741569952, "model": "gpt-4.1-2025-04-14",
"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello! How can I assist you today?",
"refusal": null, "annotations": []}, "logprobs": null, "finish_reason": "stop"}], "usage": {"prompt_tokens": 19,
"completion_tokens": 10, "total_tokens": 29, "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
"completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 0, "accepted_prediction_tokens": 0,
"rejected_prediction_tokens": 0}}, "service_tier": "default"}"""

# Source: OpenAI, structured outputs guide, "Refusals".
OPENAI_REFUSAL = b"""{"id": "chatcmpl-9nYA", "object": "chat.completion", "created": 1721596428, "model": "gpt-4o",
"choices": [{"index": 0, "message": {"role": "assistant", "content": null,
"refusal": "I'm sorry, I cannot assist with that request."}, "logprobs": null, "finish_reason": "stop"}],
"usage": {"prompt_tokens": 81, "completion_tokens": 11, "total_tokens": 92}}"""

# Source: Mistral, reasoning guide: content as a list of parts.
MISTRAL_PARTS = b"""{"id": "cmpl-e5cc", "object": "chat.completion", "model": "magistral-medium",
"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text",
"text": "Sixteen?"}]}, {"type": "text", "text": "It is "}, {"type": "text", "text": "sixteen."}]},
"finish_reason": "stop"}], "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}}"""


@dataclass(frozen=True)
class Read:
    text: str
    model: str
    finish_reason: str
    usage: Json


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            VLLM,
            Read(
                "Kubernetes, often abbreviated as K8s, is",
                "phi-4-mini-instruct",
                "length",
                {"prompt_tokens": 17, "completion_tokens": 50, "total_tokens": 67},
            ),
        ),
        (
            VLLM_REASONING,
            Read(
                "9.8 is greater.",
                "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
                "stop",
                {"prompt_tokens": 12, "completion_tokens": 78, "total_tokens": 90},
            ),
        ),
        (
            OLLAMA,
            Read("Hello", "llama3", "length", {"prompt_tokens": 23, "completion_tokens": 1, "total_tokens": 24}),
        ),
        (
            LLAMA_CPP,
            Read(
                "A llama is an animal.",
                "LiquidAI/LFM2-1.2",
                "stop",
                {"prompt_tokens": 14, "completion_tokens": 11, "total_tokens": 25},
            ),
        ),
        (
            OPENAI,
            Read(
                "Hello! How can I assist you today?",
                "gpt-4.1-2025-04-14",
                "stop",
                {
                    "prompt_tokens": 19,
                    "completion_tokens": 10,
                    "total_tokens": 29,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 3},
                },
            ),
        ),
        (
            MISTRAL_PARTS,
            Read(
                "It is sixteen.",
                "magistral-medium",
                "stop",
                {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
            ),
        ),
    ],
    ids=["vllm", "vllm-reasoning", "ollama", "llama.cpp", "openai", "mistral-parts"],
)
def test_published_answers_are_read(body: bytes, expected: Read) -> None:
    """Every server's answer yields its text, model, counts and reason, and none of its thinking."""
    verdict = read_response(200, {}, body, asked_model="asked")
    assert verdict == Answer(expected.text, expected.model, expected.usage, expected.finish_reason)


@pytest.mark.parametrize(
    ("body", "code", "consequence"),
    [
        (VLLM_STILL_THINKING, "answer_cut_off", "reject"),
        (OLLAMA_STILL_THINKING, "answer_cut_off", "reject"),
        (VLLM_TOOL_CALL, "no_text", "charged"),
        (OPENAI_REFUSAL, "model_refused", "reject"),
    ],
    ids=["vllm-still-thinking", "ollama-still-thinking", "vllm-tool-call", "openai-refusal"],
)
def test_published_answers_without_text_say_nothing_against_the_replica(
    body: bytes, code: str, consequence: str
) -> None:
    """A model that refuses, thinks too long or calls a tool did its part."""
    verdict = read_response(200, {}, body, asked_model="asked")
    assert isinstance(verdict, Failure)
    assert (verdict.code, verdict.consequence, verdict.is_healthy) == (code, consequence, True)


@pytest.mark.parametrize(
    ("status", "body", "code", "consequence"),
    [
        # Source: harbor-framework/harbor#996 (vLLM 0.16).
        (
            400,
            b'{"error": {"message": "You passed 1015 input tokens and requested 10 output tokens. However, the '
            b'model\'s context length is only 1024 tokens", "type": "BadRequestError", '
            b'"param": "input_tokens", "code": 400}}',
            "context_too_long",
            "reject",
        ),
        # Source: vllm-project/vllm#20409 (vLLM 0.9, flat error object as in vllm-project/vllm#4667).
        (
            400,
            b'{"object": "error", "message": "This model\'s maximum context length is 16384 tokens. However, you '
            b'requested 122946 tokens", "type": "BadRequestError", "param": null, "code": 400}',
            "context_too_long",
            "reject",
        ),
        # Source: ggml-org/llama.cpp#15780: it came with status 500 ...
        (
            500,
            b'{"error": {"code": 500, "message": "the request exceeds the available context size. try increasing the '
            b'context size", "type": "exceed_context_size_error", "n_prompt_tokens": 1407, "n_ctx": 256}}',
            "context_too_long",
            "reject",
        ),
        # ... and, as oobabooga/textgen#7257 saw it, with status 200.
        (
            200,
            b'{"error": {"code": 400, "message": "the request exceeds the available context size.", '
            b'"type": "exceed_context_size_error", "n_prompt_tokens": 14429, "n_ctx": 8192}}',
            "context_too_long",
            "reject",
        ),
        # Source: OpenAI, error codes.
        (
            400,
            b'{"error": {"message": "Please reduce the length of the messages.", "type": "invalid_request_error", '
            b'"param": "messages", "code": "context_length_exceeded"}}',
            "context_too_long",
            "reject",
        ),
        # Source: netease-youdao/QAnything#555 (Ollama).
        (
            404,
            b'{"error": {"message": "model \\"ollama\\" not found, try pulling it first", "type": "api_error", '
            b'"param": null, "code": null}}',
            "model_not_found",
            "reject",
        ),
        # Source: vLLM, serving_engine, create_error_response.
        (
            404,
            b'{"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}',
            "model_not_found",
            "reject",
        ),
        # Source: mostlygeek/llama-swap#146 (llama.cpp).
        (
            503,
            b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}',
            "replica_busy",
            "uncharged",
        ),
        # Source: ollama/ollama#4159.
        (
            503,
            b'{"error":"server busy, please try again.  maximum pending requests exceeded"}',
            "replica_busy",
            "uncharged",
        ),
        # Source: OpenAI, error codes: the message repeats parts of the key.
        (
            401,
            b'{"error": {"message": "Incorrect API key provided: sk-ab***yz.", "type": "invalid_request_error", '
            b'"param": null, "code": "invalid_api_key"}}',
            "replica_refused_credentials",
            "charged",
        ),
        # Source: FastAPI's validation errors, as vLLM and TGI front ends give them.
        (
            422,
            b'{"detail": [{"loc": ["body", "messages"], "msg": "field required", "type": "value_error.missing"}]}',
            "bad_request",
            "reject",
        ),
        # Source: Hugging Face TGI, validation errors.
        (
            422,
            b'{"error": "Input validation error: `inputs` must have less than 1024 tokens", '
            b'"error_type": "validation"}',
            "bad_request",
            "reject",
        ),
    ],
)
def test_published_errors_are_recognised(status: int, body: bytes, code: str, consequence: str) -> None:
    """Every server's own way to say what is wrong leads to one code."""
    verdict = read_response(status, {}, body, asked_model="asked")
    assert isinstance(verdict, Failure)
    assert (verdict.code, verdict.consequence) == (code, consequence)
    assert "sk-ab" not in verdict.message
