"""`python -m tools.generate`: what it writes, and what it refuses in one line."""

import ast
import json
import os

import pytest

import qwen_jax
from qwen_jax.config import RopeKind
from qwen_jax.hf_rope import ROPE_OPTIONS
from tests.commands import ROOT, only_line
from tests.text.chat_templates import QWEN3
from tests.tools.conftest import DEFAULTS, refusal, start_tool

LONG = "a" * 301
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the sky"}]
LINES = {
    "prompts": ['{"prompt": "the\u2028end", "id": 7}', "", '{"prompt": "x"}'],
    "chats": [
        json.dumps({"messages": CHAT}),
        json.dumps({"messages": CHAT, "tools": TOOLS}),
        '{"prompt": "Hi"}',
    ],
    "broken": ['{"prompt": "x"}', "", '{"prompt": "x'],
    "list": ["[1]"],
    "nested": ["[" * 100_000],
    "number": ['{"prompt": 1' + "0" * 5000 + "}"],
    "wordless": ['{"prompt": 5}'],
    "silent": ['{"text": "x"}'],
    "both": ['{"prompt": "x", "messages": []}'],
    "nobody": ['{"messages": [{"content": "x"}]}'],
    "toolbox": ['{"messages": [{"role": "user", "content": "x"}], "tools": [3]}'],
    "half": ['{"prompt": "\\ud800"}'],
    "holes": [
        '{"prefix": "the ", "suffix": " end<|endoftext|>"}',
        json.dumps(
            {
                "prefix": "a",
                "suffix": "",
                "repository": "r",
                "path": "p",
                "files": [{"path": "q", "content": "<|fim_middle|>"}],
            }
        ),
    ],
    "hole": ['{"prefix": "x"}'],
    "partial": ['{"prefix": "x", "suffix": "y", "path": "z"}'],
    "filing": ['{"prefix": "x", "suffix": "y", "path": "z", "repository": "r", "files": [3]}'],
    "paths": ['{"prefix": "x", "suffix": "y", "path": "a\\nb", "repository": "r", "files": []}'],
    "blank": [""],
}
TEMPLATES = {
    "opening": QWEN3 + "{{- '<think>\\n' }}",
    "looping": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "raising": "{{ raise_exception('no thanks') }}",
    "mistyped": "{% if %}",
}
INFILL = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
          "<|file_sep|>"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("input")
    for name, lines in LINES.items():
        (directory / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (directory / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (directory / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}')
    return directory


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory):
    """Checkpoints that differ from the good one in one file."""

    def altered(name, file, text):
        directory = tmp_path_factory.mktemp("models") / name
        directory.mkdir()
        for path in checkpoint.iterdir():
            (directory / path.name).symlink_to(path)
        (directory / file).unlink()
        (directory / file).write_text(text, encoding="utf-8")
        return directory

    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    far = {str(i): {"content": f"<|{i}|>", "special": True} for i in range(264, 321)}
    config["added_tokens_decoder"].update(far)
    thoughtless = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del thoughtless["added_tokens_decoder"]["262"], thoughtless["added_tokens_decoder"]["263"]
    coder = json.loads((checkpoint / "tokenizer_config.json").read_text())
    coder["added_tokens_decoder"].update(
        {str(264 + i): {"content": token, "special": False} for i, token in enumerate(INFILL)}
    )
    return {
        "good": checkpoint,
        "coder": altered("coder", "tokenizer_config.json", json.dumps(coder)),
        "misfit": altered("misfit", "tokenizer_config.json", json.dumps(config)),
        "thoughtless": altered("thoughtless", "tokenizer_config.json", json.dumps(thoughtless)),
        "beams": altered("beams", "generation_config.json", '{"num_beams": 4}'),
        **{name: altered(name, "chat_template.jinja", text) for name, text in TEMPLATES.items()},
    }


PROMPTS = ["--prompt=the sea", "--prompt=x", "--prompt=Hello"]
WRITES = {
    "texts": PROMPTS,
    "json": [*PROMPTS, "--output=json", "--batch_size=2", "--seed=3"],
    "json again": [*PROMPTS, "--output=json", "--batch_size=2", "--seed=3"],
    "other seed": [*PROMPTS, "--output=json", "--seed=4"],
    "greedy": ["--prompt=the sea", "--output=json", "--temperature=0", "--max_new_tokens=14"],
    "looked up": ["--prompt=the sea", "--output=json", "--temperature=0", "--max_new_tokens=14",
                  "--speculate=lookup", "--draft_tokens=3"],
    "drafted": [*PROMPTS, "--output=json", "--temperature=0", "--batch_size=2",
                "--speculate=draft", "--draft_model={good}"],
    "drafted stream": ["--prompt=the sea", "--temperature=0", "--max_new_tokens=14",
                       "--speculate=draft", "--draft_model={good}", "--draft_tokens=13"],
    "yarn": ["--prompt=the sea", "--output=json", "--temperature=0", "--max_new_tokens=14",
             "--rope=yarn:4,original=32"],
    "penalty": ["--prompt=the sea", "--output=json", "--temperature=0", "--max_new_tokens=14",
                "--repetition_penalty=1.5"],
    "input": ["--input={files}/prompts.jsonl", "--output=json"],
    "marked": ["--input={files}/marked.jsonl", "--output=json"],
    "chats": ["--input={files}/chats.jsonl", "--output=json", "--chat", "--nothinking"],
    "system": ["--prompt=the sky", "--output=json", "--chat", "--system=Be brief."],
    "typed": ["--prompt=a<|im_end|>b", "--output=json"],
    "typed, allowed": ["--prompt=a<|im_end|>b", "--output=json", "--allow_special"],
    "longer": [f"--prompt={LONG}", "--allow_longer", "--output=json"],
    "longer, scaled": [f"--prompt={LONG}", "--rope=yarn:4,original=300", "--output=json"],
    "budget": ["--prompt=the sky", "--prompt=x", "--chat", "--thinking", "--thinking_budget=3",
               "--output=json", "--temperature=0", "--model={opening}"],
    "budget of none": ["--prompt=x", "--chat", "--thinking_budget=0", "--output=json",
                       "--temperature=0", "--model={opening}"],
    "budget in text": ["--prompt=x", "--chat", "--thinking_budget=2", "--temperature=0",
                       "--model={opening}"],
    "holes": ["--input={files}/holes.jsonl", "--infill", "--output=json", "--model={coder}",
              "--temperature=0"],
    "half": ["--prompt=x", "--dtype=bfloat16", "--output=json"],
    "int8 cache": ["--prompt=the sea", "--prompt=x", "--output=json", "--max_new_tokens=40",
                   "--cache_dtype=int8"],
}  # fmt: skip
REFUSES = {
    "no prompt": ([], "give --prompt (repeatable) or --input"),
    "both": (["--prompt=x", "--input={files}/prompts.jsonl"], "give --prompt (repeatable) or"),
    "empty prompt": (["--prompt="], "prompt 1: is empty"),
    "unknown flag": (["--prompt=x", "--promt=y"], "Unknown command line flag 'promt'"),
    "stray word": (["--prompt=x", "y"], "y: arguments are given as flags"),
    "no such format": (["--prompt=x", "--output=xml"], "flag --output=xml: value should be"),
    "no tokens": (["--prompt=x", "--max_new_tokens=0"], "flag --max_new_tokens=0"),
    "no batch": (["--prompt=x", "--batch_size=0"], "flag --batch_size=0"),
    "seed": (["--prompt=x", "--seed=4294967296"], "flag --seed=4294967296"),
    "temperature": (["--prompt=x", "--temperature=-0.5"], "temperature = -0.5 should be"),
    "temperature word": (["--prompt=x", "--temperature=hot"], "flag --temperature=hot"),
    "top_p": (["--prompt=x", "--top_p=1.2"], "top_p = 1.2 should be"),
    "stop": (["--prompt=x", "--stop="], "stop strings must be non-empty"),
    "system alone": (["--prompt=x", "--system=y"], "--system needs --chat"),
    "thinking alone": (["--prompt=x", "--thinking"], "--thinking needs --chat"),
    "budget alone": (["--prompt=x", "--thinking_budget=3"], "--thinking_budget needs --chat"),
    "budget below": (["--prompt=x", "--chat", "--thinking_budget=-1"],
                     "flag --thinking_budget=-1"),
    "thoughtless": (["--prompt=x", "--chat", "--thinking_budget=3", "--model={thoughtless}"],
                    "thinking_budget: the tokenizer has no token <think>"),
    "mtp without": (["--prompt=x", "--speculate=mtp"],
                    "the model has no head for the token after the next (mtp_layers = 0); look"),
    "draft without": (["--prompt=x", "--speculate=draft"],
                      "--draft_model and --speculate=draft need each other"),
    "draft model alone": (["--prompt=x", "--draft_model={good}", "--speculate=lookup"],
                          "--draft_model and --speculate=draft need each other"),
    "draft tokens alone": (["--prompt=x", "--draft_tokens=3"], "--draft_tokens needs --speculate"),
    "draft nothing": (["--prompt=x", "--speculate=lookup", "--draft_tokens=0"],
                      "flag --draft_tokens=0"),
    "speculate": (["--prompt=x", "--speculate=guess"], "flag --speculate=guess: value should be"),
    "speculate mesh": (["--prompt=x", "--speculate=lookup", "--mesh=tensor:2"],
                       "--speculate runs on one device; leave out --mesh"),
    "speculate rope": (["--prompt=x", "--speculate=lookup", "--rope=dynamic:2"],
                       "rope_type = dynamic changes with the length of the text"),
    "draft nowhere": (["--prompt=x", "--speculate=draft", "--draft_model=/no/where"],
                      "/no/where: no such directory"),
    "draft tokens": (["--prompt=x", "--speculate=draft", "--draft_model={thoughtless}"],
                     "--draft_model={thoughtless}: its tokenizer has other tokens than the"),
    "infill alone": (["--infill"], "--infill takes --input=FILE.jsonl, and neither --chat nor"),
    "empty input": (["--input="], "--input is empty; give a path"),
    "infill prompt": (["--prompt=x", "--infill"], "--infill takes --input=FILE.jsonl"),
    "infill chat": (["--input={files}/holes.jsonl", "--infill", "--chat"], "--infill takes"),
    "infill without": (["--input={files}/holes.jsonl", "--infill"],
                       "{files}/holes.jsonl:1: infill: the tokenizer has no tokens such as"),
    "hole": (["--input={files}/hole.jsonl", "--infill"],
             "{files}/hole.jsonl:1: needs suffix besides prefix"),
    "partial": (["--input={files}/partial.jsonl", "--infill"],
                "{files}/partial.jsonl:1: needs repository, files besides"),
    "filing": (["--input={files}/filing.jsonl", "--infill"],
               "{files}/filing.jsonl:1: files should be a list of objects with path and content"),
    "paths": (["--input={files}/paths.jsonl", "--infill", "--model={coder}"],
              "{files}/paths.jsonl:1: infill: path should be one line of text, is 'a\\nb'"),
    "dtype": (["--prompt=x", "--dtype=int8"], "flag --dtype=int8: value should be one of"),
    "cache dtype": (["--prompt=x", "--cache_dtype=int4"],
                    "flag --cache_dtype=int4: value should be one of <int8>"),
    "rope kind": (["--prompt=x", "--rope=spiral:2"], "--rope=spiral:2: kind 'spiral' is unknown"),
    "rope form": (["--prompt=x", "--rope=yarn:4,original"], "--rope=yarn:4,original: 'original'"),
    "no such model": (["--prompt=x", "--model=/no/where"], "/no/where: no such directory"),
    "file as model": (["--prompt=x", "--model={good}/config.json"], "{good}/config.json: is a fil"),
    "misfit": (["--prompt=x", "--model={misfit}"], "tokenizer: token '<|320|>' has id 320"),
    "beams": (["--prompt=x", "--model={beams}"], "{beams}/generation_config.json: num_beams = 4"),
    "too long": ([f"--prompt={LONG}"], "prompt 1: 301 tokens are longer than max_position_embed"),
    "looping": (["--prompt=x", "--chat", "--model={looping}"],
                "prompt 1: {looping}/chat_template.jinja: chat template was stopped"),
    "raising": (["--prompt=x", "--chat", "--model={raising}"],
                "prompt 1: {raising}/chat_template.jinja: chat template refuses these messages: n"),
    "mistyped": (["--prompt=x", "--chat", "--model={mistyped}"],
                 "prompt 1: {mistyped}/chat_template.jinja: chat template has a syntax error"),
    "absent input": (["--input={files}/none.jsonl"], "{files}/none.jsonl: cannot be read (No such"),
    "folder input": (["--input={files}"], "{files}: cannot be read (Is a directory)"),
    "latin input": (["--input={files}/latin.jsonl"], "{files}/latin.jsonl: is not UTF-8 text"),
    "blank": (["--input={files}/blank.jsonl"], "{files}/blank.jsonl: holds no lines"),
    "broken": (["--input={files}/broken.jsonl"], "{files}/broken.jsonl:3: not valid JSON (Untermi"),
    "nested": (["--input={files}/nested.jsonl"], "{files}/nested.jsonl:1: not valid JSON"),
    "number": (["--input={files}/number.jsonl"], "{files}/number.jsonl:1: not valid JSON"),
    "list": (["--input={files}/list.jsonl"], "{files}/list.jsonl:1: should be an object, is"),
    "wordless": (["--input={files}/wordless.jsonl"], "{files}/wordless.jsonl:1: prompt should be"),
    "silent": (["--input={files}/silent.jsonl"], "{files}/silent.jsonl:1: needs prompt; has text"),
    "chat as text": (["--input={files}/chats.jsonl"], "{files}/chats.jsonl:1: messages needs --ch"),
    "two": (["--input={files}/both.jsonl", "--chat"], "{files}/both.jsonl:1: needs either prompt"),
    "nobody": (["--input={files}/nobody.jsonl", "--chat"], "{files}/nobody.jsonl:1: messages[0]: "),
    "toolbox": (["--input={files}/toolbox.jsonl", "--chat"], "{files}/toolbox.jsonl:1: tools[0]: "),
    "half": (["--input={files}/half.jsonl"], "{files}/half.jsonl:1: text: character 0 is half"),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(files, models, run_tool):
    """(exit status, stdout, stderr) of each command line above."""
    cases = {**WRITES, **{f"refuse {name}": given for name, (given, _) in REFUSES.items()}}
    places = {"files": files, **models}
    outcomes = {}
    for name, arguments in cases.items():
        filled = [argument.format(**places) for argument in arguments]
        if not any(argument.startswith("--model") for argument in filled):
            filled.insert(0, f"--model={models['good']}")
        done = run_tool("generate", *filled)
        outcomes[name] = (done.returncode, done.stdout, done.stderr)
    return outcomes


@pytest.fixture(scope="module")
def written(results):
    """The records of a case of `--output=json`."""

    def records(name):
        code, out, err = results[name]
        assert (code, err) == (0, ""), err
        return [json.loads(line) for line in out.split("\n")[:-1]]

    return records


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, params = qwen_jax.load_pretrained(checkpoint)
    tokenizer = qwen_jax.load_tokenizer(checkpoint)

    def generate(prompts, max_new_tokens=DEFAULTS["max_new_tokens"], **options):
        stop_ids = [tokenizer.eos_token_id]
        return qwen_jax.generate(
            model, params, prompts, max_new_tokens, stop_ids=stop_ids, **options
        )

    return tokenizer, generate


def test_speculation_writes_the_same_and_says_how_much_stood(results, written, loaded):
    tokenizer, generate = loaded
    (expected,) = written("greedy")
    code, out, err = results["looked up"]
    assert code == 0
    assert json.loads(out) == expected
    assert err.startswith("speculation: ")
    assert err.endswith(" tokens a pass\n")
    code, out, err = results["drafted"]
    assert code == 0
    prompts = [tokenizer.encode(prompt) for prompt in ("the sea", "x", "Hello")]
    assert ids_of(map(json.loads, out.splitlines())) == generate(prompts)
    assert "(100.0%), " in err
    # One guess of all but the last token.
    code, out, err = results["drafted stream"]
    assert (code, out) == (0, expected["text"] + "\n")
    n = len(expected["token_ids"])
    assert err == f"speculation: 13 of 13 drafted tokens stood (100.0%), {n}.00 tokens a pass\n"


def ids_of(records):
    return [record["token_ids"] for record in records]


def test_records_hold_what_the_package_generates(written, loaded):
    """With the checkpoint's own sampling, the seed of the flag, and batches that do not show."""
    tokenizer, generate = loaded
    records = written("json")
    prompts = ["the sea", "x", "Hello"]
    expected = generate([tokenizer.encode(p) for p in prompts], temperature=0.8, top_k=30, seed=3)
    assert ids_of(records) == expected
    for record, prompt, ids in zip(records, prompts, expected, strict=True):
        assert record == {
            "prompt": prompt,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "token_ids": ids,
            "prompt_tokens": len(tokenizer.encode(prompt)),
            "finish_reason": "stop" if ids[-1] == tokenizer.eos_token_id else "length",
        }


def test_a_seed_reproduces(written):
    assert written("json") == written("json again")
    assert ids_of(written("json")) != ids_of(written("other seed"))


def test_flags_override_the_checkpoint(written, loaded):
    tokenizer, generate = loaded
    prompts = [tokenizer.encode("the sea")]
    assert ids_of(written("greedy")) == generate(prompts, 14)
    assert ids_of(written("penalty")) == generate(prompts, 14, repetition_penalty=1.5)


def test_rope_is_scaled_by_its_flag(written, checkpoint, loaded):
    tokenizer, _ = loaded
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model, params = qwen_jax.load_pretrained(checkpoint, rope_scaling=scaling)
    expected = qwen_jax.generate(
        model, params, [tokenizer.encode("the sea")], 14, stop_ids=[tokenizer.eos_token_id]
    )
    assert ids_of(written("yarn")) == expected != ids_of(written("greedy"))


def test_a_cache_is_kept_in_int8_by_its_flag(written, loaded):
    tokenizer, generate = loaded
    prompts = [tokenizer.encode(text) for text in ("the sea", "x")]
    found = ids_of(written("int8 cache"))
    sampling = {"temperature": DEFAULTS["temperature"], "top_k": DEFAULTS["top_k"]}
    assert found == generate(prompts, 40, cache_dtype="int8", **sampling)
    assert found != generate(prompts, 40, **sampling)


def test_lines_of_a_file_are_prompts_and_keep_their_fields(written):
    first, second = written("input")
    assert (first["prompt"], first["id"], second["prompt"]) == ("the\u2028end", 7, "x")
    assert written("marked")[0]["prompt"] == "x"


def test_lines_of_a_file_are_chats(written, loaded):
    tokenizer, generate = loaded
    user = [{"role": "user", "content": "Hi"}]
    prompts = [
        tokenizer.apply_chat_template(
            messages, tools, add_generation_prompt=True, enable_thinking=False
        )
        for messages, tools in ((CHAT, None), (CHAT, TOOLS), (user, None))
    ]
    records = written("chats")
    assert [record["prompt_tokens"] for record in records] == list(map(len, prompts))
    assert ids_of(records) == generate(prompts, temperature=0.8, top_k=30)
    assert records[1]["tools"] == TOOLS


def test_a_prompt_with_chat_is_a_user_message(written, loaded):
    tokenizer, generate = loaded
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids_of(written("system")) == generate([ids], temperature=0.8, top_k=30)


def test_control_tokens_are_text_unless_allowed(written):
    assert written("typed")[0]["prompt_tokens"] == len("a<|im_end|>b")
    assert written("typed, allowed")[0]["prompt_tokens"] == 3


def test_reasoning_is_closed_at_its_budget(written, results, loaded, models):
    tokenizer, generate = loaded
    closing = tokenizer.encode("</think>\n\n")
    opening = qwen_jax.load_tokenizer(models["opening"])
    for record, said in zip(written("budget"), ("the sky", "x"), strict=True):
        chat = [{"role": "user", "content": said}]
        ids = opening.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=True)
        free = generate([ids], 3)[0]
        assert record["token_ids"][: 3 + len(closing)] == free + closing
        assert record["reasoning"] == tokenizer.decode(free, skip_special_tokens=True).strip("\n")
        answer = tokenizer.decode(record["token_ids"][3 + len(closing) :], skip_special_tokens=True)
        assert record["content"] == answer.lstrip("\n")
        assert (record["tool_calls"], record["problems"]) == ([], [])
    (record,) = written("budget of none")
    assert record["token_ids"][: len(closing)] == closing
    assert record["reasoning"] == ""
    assert results["budget in text"][1].count("</think>\n\n") == 1


def test_replies_are_taken_apart_in_records_of_chats(written):
    for record in written("chats"):
        assert (record["reasoning"], record["content"]) == (None, record["text"])
        assert (record["tool_calls"], record["problems"]) == ([], [])
    assert "content" not in written("json")[0]


def test_holes_are_filled(written, models):
    tokenizer = qwen_jax.load_tokenizer(models["coder"])
    first, second = written("holes")
    ids = tokenizer.encode("<|fim_prefix|>the <|fim_suffix|>") + tokenizer.encode(
        " end<|endoftext|>", allow_special=False
    )
    ids.append(tokenizer.token_to_id("<|fim_middle|>"))
    assert first["prompt_tokens"] == len(ids)
    model, params = qwen_jax.load_pretrained(models["coder"])
    stop_ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", *INFILL)]
    expected = qwen_jax.generate(
        model, params, [ids], DEFAULTS["max_new_tokens"], stop_ids=stop_ids
    )
    assert first["token_ids"] == expected[0]
    # r, p, q, a, four line ends, the spelled token, and six tokens: name, two files, the hole.
    assert second["prompt_tokens"] == 4 + 4 + len("<|fim_middle|>") + 6
    assert second["files"] == [{"path": "q", "content": "<|fim_middle|>"}]


def test_several_texts_are_numbered(results):
    code, out, err = results["texts"]
    assert (code, err) == (0, "")
    assert [line for line in out.split("\n") if line.startswith("---")] == [
        "--- 1 of 3",
        "--- 2 of 3",
        "--- 3 of 3",
    ]


def test_a_prompt_beyond_the_positions_runs_when_asked_for(results, written):
    assert written("longer, scaled")[0]["prompt_tokens"] == 301
    code, out, err = results["longer"]
    assert (code, json.loads(out)["prompt_tokens"]) == (0, 301)
    line = only_line(err)
    assert line.startswith("warning: the text is longer than the model's 300 positions")


def test_bfloat16_runs(written):
    assert len(written("half")[0]["token_ids"]) == 9


@pytest.mark.parametrize("name", REFUSES, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_is_refused_in_one_line(results, files, models, name):
    code, out, err = results[f"refuse {name}"]
    assert (code, out) == (1, "")
    line = only_line(err)
    expected = REFUSES[name][1].format(files=files, **models)
    assert line.startswith(expected)
    assert len(line) < 400


def test_one_prompt_streams_to_stdout_until_a_stop_string(checkpoint, environment, loaded):
    tokenizer, generate = loaded
    (ids,) = generate([tokenizer.encode("the sea")], 120)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stop = text[60:63]
    cut = text[: text.index(stop)]
    assert len(cut) > 40
    with start_tool(
        environment, "generate", f"--model={checkpoint}", "--prompt=the sea", f"--stop={stop}",
        "--temperature=0", "--max_new_tokens=120",
    ) as child:  # fmt: skip
        first = os.read(child.stdout.fileno(), 10_000)
        rest, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert (first + rest).decode() == cut + "\n"
    assert len(first) < len(rest)


def test_a_reader_that_goes_away_is_no_error(checkpoint, environment):
    with start_tool(
        environment, "generate", f"--model={checkpoint}", "--prompt=the", "--temperature=0",
        "--max_new_tokens=150",
    ) as child:  # fmt: skip
        os.read(child.stdout.fileno(), 1)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


def test_help_lists_every_flag(run_tool):
    result = run_tool("generate", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Writes text with a checkpoint.")
    assert "python -m tools.generate --model=" in result.stdout
    defined = {
        call.args[0].value
        for name in ("generate", "text_flags", "model_flags")
        for call in ast.walk(ast.parse((ROOT / "tools" / f"{name}.py").read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "").startswith("DEFINE_")
    }
    assert len(defined) > 20
    for name in defined:
        assert f"--{name}: " in result.stdout or f"--[no]{name}: " in result.stdout
    assert ".;" not in result.stdout
    parts = result.stdout.split("\n  --")
    described = {part.partition(":")[0]: " ".join(part.split()) for part in parts}
    for name in ("[no]thinking", "thinking_budget"):
        assert "needs --chat" in described[name]
    options = {option for options in ROPE_OPTIONS.values() for option in options}
    # Given behind the colon, as `original`, and in a file.
    options -= {"factor", "original_max_position_embeddings"}
    more = (
        "none",
        "dca",
        "rerope",
        "self_extend",
        "sinks",
        "stretch",
        "resonance",
        "original",
        "factors",
        "chunk_size",
        "local_size",
    )
    more += ("temperature", "logn", "window", "window_layers")
    for word in (*RopeKind, *ROPE_OPTIONS, *options, *more):
        assert word in described["rope"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--prompt=x"], {}, "--model is needed; see --help"),
        (
            ["--model={checkpoint}", "--prompt=x"],
            {"JAX_PLATFORMS": "absent"},
            "JAX_PLATFORMS=absent: Unable to initialize backend 'absent'",
        ),
    ],
    ids=["no-model", "no-such-device"],
)
def test_a_process_that_cannot_run_says_why_in_one_line(
    run_tool, checkpoint, arguments, changes, message
):
    filled = [argument.format(checkpoint=checkpoint) for argument in arguments]
    assert refusal(run_tool("generate", *filled, **changes)).startswith(message)
