"""Chat templates that follow the published rules of the families, written for these tests.

Qwen3's is the embedded model's.
"""

from qwen_jax.embedded.tokenizer import TEMPLATE

QWEN25 = """\
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- default }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call functions, given in <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nCall as <tool_call>\\n{\\"name\\": X}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\n' + default + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = TEMPLATE.read_text(encoding="utf-8")

# Definitions as XML, whose tags come from the user's own keys: the shape that can forge tokens.
CODER = """\
{%- macro extra_keys(value, handled) %}
    {%- for key in value if key not in handled %}
        {%- if value[key] is mapping or value[key] is string %}
            {{- '\\n<' ~ key ~ '>' ~ value[key] ~ '</' ~ key ~ '>' }}
        {%- else %}
            {{- '\\n<' ~ key ~ '>' ~ (value[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if system_message is defined or tools %}
    {{- '<|im_start|>system\\n' + (system_message or 'You are Qwen.') }}
    {%- if tools is iterable and tools | length > 0 %}
        {{- '\\n<tools>' }}
        {%- for tool in tools %}
            {%- set tool = tool.function or tool %}
            {{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
            {{- extra_keys(tool, ['name']) }}
            {{- '\\n</function>' }}
        {%- endfor %}
        {{- '\\n</tools>\\n<tool_call>\\n<function=name>\\n</function>\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is defined and message.content is string
               and message.content | trim | length > 0 %}
            {{- '\\n' + message.content | trim + '\\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- value if value is string else value | tojson | safe }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>\\n' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Every construct that transformers sets up beyond plain jinja2.
CONSTRUCTS = """\
{%- set ns = namespace(count=0, seen='') %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.seen = ns.seen ~ message.role ~ ',' %}
    {{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ loop.first }} {{ loop.last }}
    {{ loop.previtem.role if loop.previtem else 'none' }}
    {{ loop.nextitem.role if loop.nextitem else 'none' }}
    {{ loop.cycle('a', 'b') }} {{ loop.changed(message.role) }}
    {% generation %}
    {{ message.content }}
    {%- set ns.seen = ns.seen ~ '!' %}
    {% endgeneration %}
    {%- if ns.count >= 4 %}
        {%- break %}
    {%- endif %}
{%- else %}
    nothing
{%- endfor %}
{{ ns.seen }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 'ab' * 3 }} {{ [1] * 2 }} {{ '%s-%d' % ('x', 3) }}
{{ dict(a=1, b='é') | tojson }} {{ dict.fromkeys(['k'], 0) }} {{ [3, 1, 2] | sort | join('+') }}
{{ messages | tojson(indent=2) }} {{ {'b': 'ü', 'a': 1} | tojson(sort_keys=true) }}
{{ 'é' | tojson(ensure_ascii=true) }} {{ [1, 2] | tojson(separators=(',', ':')) }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}
{{ strftime_now('%Y-%m-%d') }} {{ bos_token is defined }} {{ eos_token }} {{ pad_token }}
{{ documents is defined }} {{ tools is none }} {{ messages[0].thinking }}
{{ messages[0].reasoning_content }} {{ missing }} {{ 'x' is in 'xyz' }} {{ '{:>4}'.format(7) }}
{% for x in range(3) recursive %}{{ x }}{% endfor %}
{%- for key, value in {'p': 1, 'q': [1, 2]} | items %}{{ key }}{{ value }}{% endfor %}
"""
