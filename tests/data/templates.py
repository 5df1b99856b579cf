"""Chat templates for the tests; each has a peculiarity of templates of real models."""

_HEADER = "'<|im_start|>' + message.role + '\\n'"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def _turns(body: str, before: str = "", after: str = _PROMPT) -> str:
    return f"{before}{{% for message in messages %}}{body}{{% endfor %}}{after}"


PLAIN = _turns("{{ " + _HEADER + " + message.content + '<|im_end|>\\n' }}")

MARKED = _turns(
    "{{ " + _HEADER + " }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}"
)

# Only the last turn keeps its thinking, which may be switched off.
THINKING = _turns(
    "{{ " + _HEADER + " }}{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (message.reasoning_content or '') + '</think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}",
    after="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}",
)

BEGINNING = _turns("{{ message.role + ': ' + message.content + '<|im_end|>' }}", "{{ bos_token }}", "")

# The system's text goes into the first turn of the user; turns alternate.
MERGED = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ " + _HEADER + " + (first if loop.first else '') + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}" + _PROMPT
)

# A token closes the whole conversation, unless the assistant is to go on.
CLOSED = _turns(
    "{{ " + _HEADER + " + message.content + '<|im_end|>\\n' }}",
    after="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
)

# The prompt for the assistant opens its thinking, which its turn never shows.
OPENED = _turns(
    "{{ " + _HEADER + " + message.content + '<|im_end|>\\n' }}",
    after="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
)

# A tool's answer ends in another way if it is the last turn.
UNEVEN = _turns(
    "{{ "
    + _HEADER
    + " + message.content }}{% if message.role == 'tool' and not loop.last %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
)

# No special token at all.
BARE = _turns(
    "{{ message.role + ': ' + message.content + '\\n\\n' }}",
    after="{% if add_generation_prompt %}assistant:{% endif %}",
)

TOOLS = (
    "{% for tool in tools or [] %}{{ '<|im_start|>system\\n' + tool | tojson + '<|im_end|>\\n' }}{% endfor %}"
    "{% for message in messages %}{{ " + _HEADER + " + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + _PROMPT
)

PARTS = _turns(
    "{{ " + _HEADER + " }}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text + ('' if loop.last else '/') }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
)

# Whatever the content is, it becomes text.
TRIMMED = _turns("{{ " + _HEADER + " }}{{ message.content | trim }}{{ '<|im_end|>\\n' }}")

# Calls are recognised by a content of none.
SILENT = _turns(
    "{{ " + _HEADER + " }}{% if message['content'] is none %}{{ message.tool_calls[0].function.name }}"
    "{% else %}{{ '' + message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
)

# The prompt for the assistant stands before everything.
AHEAD = _turns(
    "{{ " + _HEADER + " + message.content + '<|im_end|>\\n' }}",
    "{{ 'go on' if add_generation_prompt else 'read' }}",
    "",
)

# It takes only texts.
JOINED = _turns("{{ message.content }}", after="")

# It skips roles that it does not know.
STRICT = _turns(
    "{% if message.role in ('user', 'assistant') %}{{ "
    + _HEADER
    + " + message.content + '<|im_end|>\\n' }}{% endif %}"
)

# Like OpenAI's harmony: channels, thinking only in the last turn, and another token at the end of that turn.
HARMONY = (
    "{% for message in messages %}{{ '<|start|>' + message.role }}{% if message.role == 'assistant' %}"
    "{% if message.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{% if message.tool_calls %}"
    "{{ ' to=' + message.tool_calls[0].function.name + '<|channel|>commentary<|message|>' }}"
    "{{ message.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ '<|channel|>final<|message|>' + message.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|message|>' + message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
