//! Does a prompt that is made after an earlier one's front equal the one that is made whole?

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;

use super::watched;
use crate::model::language::{Argument, ChatMessage, Front, History, Language, TemplateError, ToolCall};
use crate::model::tokenizer::byte_alphabet;
use crate::model::weights::WeightFile;
use crate::model::weights::gguf::Value as GgufValue;
use crate::types::TokenId;

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n\
                       You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                       '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + \
                      message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}\
                      {% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}";
const LLAMA32: &str = "
    {{- bos_token }}
    {%- if not date_string is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- endif %}
    {%- if messages[0]['role'] == 'system' %}
        {%- set system_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {%- set system_message = '' %}
    {%- endif %}
    {{- '<|start|>system<|end|>\n\nToday: ' + date_string + '\n\n' + system_message + '<|im_end|>' }}
    {%- if tools is not none and messages | length != 0 %}{{ tools }}{% endif %}
    {%- for message in messages %}
        {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
            {{- '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<|im_end|>' }}
        {%- elif 'tool_calls' in message %}
            {%- for call in message.tool_calls %}{{ loop.index }}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}
        {%- else %}{{ '<|start|>tool' + message.content }}
        {%- endif %}
    {%- endfor %}
    {%- if add_generation_prompt %}
        {{- '<|start|>assistant<|end|>\n\n' }}
    {%- endif %}";
const QWEN25: &str = r#"{%- if tools %}
    {{- tools }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;
/// Demands alternation, as Mistral's and Gemma's do.
const STRICT: &str = "
    {%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
    {{- bos_token }}
    {%- for m in rest %}
        {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
        {%- if m.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m.role %}{% endif %}
        {{- '<|start|>' + role + '\n' + (first if loop.first else '') + m.content | trim + '<|im_end|>\n' }}
    {%- endfor -%}
    {% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}";
/// No markup at all, so that fronts end inside of tokens, and words of the vocabulary span them.
const BARE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}";

/// Templates whose front grows with the conversation.
const GROWING: [&str; 6] = [CHATML, SMOLLM2, LLAMA3, LLAMA32, QWEN25, STRICT];

/// Templates that look at the whole conversation, keep something between rounds, take the loop's text for themselves, or do
/// with the messages or the loop what nobody watches.
const OTHERS: [&str; 25] = [
    BARE,
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% if messages[loop.index0 + 2] is defined %}+{% endif %}{% endfor %}",
    // A control token that is one only if another message follows.
    "{% for m in messages %}{% if not loop.first %}{% if loop.last %}!{% else %}start|>{% endif %}{% endif %}{{ m.role }}{{ m.content }}<|im_{% endfor %}",
    // A round that begins with a shield, whose character the template cut off.
    "{% for m in messages %}{{ m.content[1:] }}{{ m.role }}<{% endfor %}",
    "{% set rest = messages[1:] %}{% for m in rest %}<|im_start|>{{ m.role }}{{ m.content }}{% if loop.last %}!{{ loop.length }}{{ loop.depth }}{% endif %}{% else %}none{% endfor %}",
    "{% for m in messages[2:] %}{% if loop is mapping and loop and 'first' in loop and 'x' not in loop %}{{ m.content }}{{ loop.x }}{% endif %}<|im_end|>{{ loop.index }}{% endfor %}{{ messages[0].content }}{{ messages[1] }}",
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% if add_generation_prompt and m.role == 'user' %}?{% endif %}{% endfor %}",
    "{% macro end() %}{{ 'a' if add_generation_prompt else 'b' }}{% endmacro %}{% for m in messages %}<|im_start|>{{ m.content }}{{ end() }}{% endfor %}",
    // Qwen 3 drops what was thought in all but the last answer.
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
     {%- for m in messages %}{{ '<|im_start|>' + m.role }}{% if loop.index0 > ns.last %}!{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
    "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{{ loop.length }}{{ loop.revindex }}<|im_end|>{% endfor %}",
    "{% for m in messages %}{% if loop.nextitem %}{{ loop.nextitem.role }}{% endif %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{{ loop.previtem.content }}{% if loop.last %}{{ messages[-1].role }}{% endif %}{% endfor %}",
    "{% for m in messages[::-1] %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "{% for m in messages if m.role != 'x' %}<|im_start|>{{ loop.index }}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "{% set all %}{% for m in messages %} <|im_start|>{{ m.role }}{{ m.content }} {% endfor %}{% endset %}{{ all | trim }}",
    "{% macro all(list) %}{% for m in list %}{{ m.role }}{{ m.content }}{% endfor %}{% endmacro %}{{ all(messages) | trim }}",
    "{% filter trim %}{% for m in messages %}{{ m.role }}{{ m.content }} {% endfor %}{% endfilter %}",
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{% for m in messages %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if messages[loop.index] is defined %}{{ messages[loop.index].role }}{% endif %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "{% for m in messages %}{{ m.role }}{{ m.content }}{{ loop.cycle('a', 'b') }}{% if loop.changed(m.role) %}!{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% else %}none{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{# {% for m in messages %} #}{% for m in messages %}{% for c in m.content.split('a') %}{{ loop.index }}{% if loop.last %}{{ c }}{% endif %}{% endfor %}{{ m.content }}{{ '{% for m in messages %}' }}{{ loop.index }}{% endfor %}",
    // `loop` is the outer one where the inner loop had nothing.
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}{{ loop.index }}{{ c.function.name }}{% else %}{{ loop.index }}{% if loop.first %}!{% endif %}{% endfor %}<|im_end|>{% endfor %}",
    // How it begins is settled by a message further on.
    "{% if messages[2:] %}+{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% if loop.first and messages[9] %}!{% endif %}<|im_end|>{% endfor %}",
];

/// A vocabulary of bytes, some words, and these control tokens.
fn tiny(template: &str, bos: bool) -> Language {
    let words = ["us", "er", "as", "ab", ": ", "a ", "b:"];
    let control = ["<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"];
    let own = ["<think>", "er: ", "  "];
    let space = |word: &str| word.replace(' ', "\u{120}");
    let tokens: Vec<String> = byte_alphabet()
        .map(String::from)
        .chain(words.map(space))
        .chain(control.map(str::to_owned))
        .chain(own.map(str::to_owned))
        .collect();
    let types = [vec![1; 256 + words.len()], vec![3; control.len()], vec![4; own.len()]].concat();
    let merges = words.map(|word| {
        let (first, second) = word.split_at(1);
        format!("{} {}", space(first), space(second))
    });
    let bos_id = 256 + words.len() as i128;
    let pairs = [
        ("tokenizer.ggml.model", GgufValue::Str("gpt2".into())),
        ("tokenizer.ggml.pre", GgufValue::Str("gpt-2".into())),
        ("tokenizer.ggml.tokens", GgufValue::Strs(tokens)),
        ("tokenizer.ggml.token_type", GgufValue::I32s(types)),
        ("tokenizer.ggml.merges", GgufValue::Strs(merges.into())),
        ("tokenizer.ggml.bos_token_id", GgufValue::Int(bos_id)),
        ("tokenizer.ggml.add_bos_token", GgufValue::Bool(bos)),
        ("tokenizer.chat_template", GgufValue::Str(template.into())),
    ];
    Language::from_metadata(&pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()).unwrap()
}

static LANGUAGES: LazyLock<Vec<Language>> = LazyLock::new(|| {
    let path = std::env::var("REKINDLE_TEST_MODEL").unwrap_or("models/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned());
    let file = WeightFile::open(path.as_ref())
        .unwrap_or_else(|error| panic!("the tests need a model: {error}; get it with `rekindle pull`"));
    let real = Language::from_metadata(file.metadata()).unwrap();
    let tiny = GROWING.iter().chain(&OTHERS).flat_map(|template| [tiny(template, false), tiny(template, true)]);
    tiny.chain([real]).collect()
});

#[derive(Clone, Debug, PartialEq)]
struct Said {
    role: &'static str,
    name: Option<String>,
    content: String,
    calls: Vec<ToolCall>,
    call_id: Option<String>,
}

struct Conversation(Vec<Said>);

impl History for Conversation {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn message(&self, index: usize) -> ChatMessage<'_> {
        let Said { role, name, content, calls, call_id } = &self.0[index];
        let (name, call_id) = (name.as_deref(), call_id.as_deref());
        ChatMessage { role, name, content: Cow::Borrowed(content), calls, call_id }
    }
}

/// A conversation as an actor has it: what was said, its tokens, and the front of its last prompt.
#[derive(Default)]
struct Kept {
    said: Vec<Said>,
    log: Vec<(TokenId, u16)>,
    front: Option<Front>,
}

impl Kept {
    /// Makes the prompt both ways and answers it. What the template wrote for it, in bytes, unless it refused.
    fn turn(
        &mut self,
        language: &Language,
        answer: Option<&str>,
        arguments: &[(String, Argument)],
        prompted: bool,
    ) -> Result<Option<usize>, TestCaseError> {
        let history: Arc<dyn History> = Arc::new(Conversation(self.said.clone()));
        let messages: Vec<_> = (0..history.count()).map(|index| history.message(index)).collect();
        let whole = language.render(&messages, prompted, arguments);
        let made = language.render_history(&history, self.front.as_ref(), prompted, arguments);
        let (whole, made) = match (whole, made) {
            (Ok(whole), Ok(made)) => (whole, made),
            (whole, made) => {
                prop_assert_eq!(whole.map(|_| ()), made.map(|_| ()));
                return Ok(None);
            }
        };
        prop_assert_eq!(whole.prompt_bytes(), made.prompt_bytes());
        prop_assert!(whole.text.ends_with(&made.text), "{:?} and {:?}", whole.text, made.text);
        let (kept, from) = match language.common_prefix(&whole, self.log.iter().copied()) {
            (_, 0) => (0, 0),
            common => common,
        };
        let common = match language.common_prefix(&made, self.log[made.tokens_before()..].iter().copied()) {
            (_, 0) => (0, 0),
            common => common,
        };
        prop_assert_eq!(common, (kept, from));
        let mut tokens = self.log[..kept].to_vec();
        let fresh = language.tokenize(&whole, from);
        prop_assert_eq!(&language.tokenize(&made, from), &fresh);
        tokens.extend(fresh);
        let written = made.written_bytes;
        let mut bytes = whole.prompt_bytes();
        let ends = (0..tokens.len()).rev().map(|index| {
            let end = (index + 1, bytes);
            bytes -= usize::from(tokens[index].1);
            end
        });
        let front = language.front(made, ends);
        if let Some(answer) = answer {
            let history: Arc<dyn History> = Arc::new(Conversation(vec![said("user", answer)]));
            let answer = language.render_history(&history, None, false, &[]).unwrap();
            tokens.extend(
                language.tokenize(&answer, 0).into_iter().filter(|(id, bytes)| *bytes > 0 && !language.is_control(*id)),
            );
            tokens.extend(language.stop_tokens().last().map(|id| (*id, language.token_bytes(*id).len() as u16)));
        }
        (self.log, self.front) = (tokens, front);
        Ok(Some(written))
    }
}

fn said(role: &'static str, content: &str) -> Said {
    Said { role, name: None, content: content.to_owned(), calls: Vec::new(), call_id: None }
}

fn content() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "a",
        "b",
        " ",
        "us",
        "er",
        ": ",
        "\n",
        "<|im_end|>",
        "<|im_",
        "start|>",
        "<",
        "<think>",
        "</think>",
        "<s>",
        "  ",
        "é",
        "😀",
        "\u{4}",
        "\u{FDD0}",
        "assistant",
        "{{ x }}",
        "user: ",
    ]);
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

fn message() -> impl Strategy<Value = Said> {
    let call = (content(), content()).prop_map(|(name, arguments)| ToolCall { id: "1".into(), name, arguments });
    let roles = prop::sample::select(vec!["user", "user", "assistant", "assistant", "system", "developer", "tool"]);
    let calls = prop::collection::vec(call, 0..2);
    (roles, content(), calls, prop::option::of(content())).prop_map(|(role, content, calls, name)| {
        let is_plain = !matches!(role, "assistant" | "tool");
        let calls = if role == "assistant" { calls } else { Vec::new() };
        let call_id = (role == "tool").then(|| "1".to_owned());
        Said { role, name: name.filter(|_| is_plain), content, calls, call_id }
    })
}

/// What comes before each prompt: as an ordinary chat goes, or any messages at all.
fn turns() -> impl Strategy<Value = Vec<Vec<Said>>> {
    let turn =
        (content(), content()).prop_map(|(answer, question)| vec![said("assistant", &answer), said("user", &question)]);
    let first = (prop::option::of(content()), content()).prop_map(|(system, question)| {
        system.iter().map(|system| said("system", system)).chain([said("user", &question)]).collect::<Vec<_>>()
    });
    let ordinary = (first, prop::collection::vec(turn, 1..6))
        .prop_map(|(first, turns)| [first].into_iter().chain(turns).collect::<Vec<_>>());
    let any = prop::collection::vec(prop::collection::vec(message(), 1..4), 1..5);
    prop_oneof![ordinary, any]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_prompt_that_follows_a_front_is_the_whole_one(turns in turns(), told in prop::collection::vec(any::<bool>(), 5), prompted in prop::collection::vec(any::<bool>(), 5), cut in content()) {
        for language in &*LANGUAGES {
            let mut kept = Kept::default();
            let prompted = prompted.iter().chain(&[true; 8]);
            for ((turn, told), prompted) in turns.iter().zip(told.iter().chain(&[true; 8])).zip(prompted) {
                // What the model said is what the next turn has as its first message, or it was cut off.
                let next = turn.first().map(|said| said.content.as_str());
                kept.said.extend(turn.iter().cloned());
                let answer = if *told { next.unwrap_or_default() } else { &cut };
                kept.turn(language, Some(answer), &[], *prompted)?;
            }
        }
    }

    #[test]
    fn other_arguments_make_another_prompt(turns in turns(), style in content()) {
        let template = "{{ style }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{{ style }}<|im_end|>{% endfor %}";
        let language = tiny(template, false);
        let mut kept = Kept::default();
        for (turn, style) in turns.iter().zip(["", &style, "", "", &style, &style]) {
            kept.said.extend(turn.iter().cloned());
            kept.turn(&language, None, &[("style".to_owned(), Argument::Text(style.to_owned()))], true)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn a_front_is_that_of_every_conversation_that_begins_with_the_messages_it_depends_on(turns in turns(), others in prop::collection::vec(message(), 0..4)) {
        for language in &*LANGUAGES {
            let mut kept = Kept::default();
            for turn in &turns {
                kept.said.extend(turn.iter().cloned());
                kept.turn(language, None, &[], true)?;
                let Some(front) = &kept.front else { continue };
                let said = kept.said[..front.depends_on()].iter().chain(&others).cloned().collect();
                let mut branch = Kept { said, log: kept.log.clone(), front: kept.front.clone() };
                branch.turn(language, None, &[], true)?;
            }
        }
    }
}

/// A chat of this many turns; how much the template wrote for each.
fn chat(language: &Language, turns: usize) -> Vec<usize> {
    let mut kept = Kept { said: vec![said("system", "Be brief.")], ..Kept::default() };
    let mut written = Vec::new();
    for turn in 0..turns {
        kept.said.push(said("user", &format!("question {turn:04}")));
        let answer = format!("answer {turn:04}");
        written.extend(kept.turn(language, Some(&answer), &[], turn % 5 != 4).unwrap());
        kept.said.push(said("assistant", &answer));
    }
    written
}

#[test]
fn common_templates_write_no_more_for_the_fortieth_turn_than_for_the_third() {
    for (template, language) in GROWING.iter().zip(LANGUAGES.iter().step_by(2)) {
        let written = chat(language, 40);
        assert!(written.iter().skip(2).all(|bytes| *bytes <= written[2]), "{template}: {written:?}");
    }
    let written = chat(&LANGUAGES[LANGUAGES.len() - 1], 40);
    assert!(written.iter().skip(2).all(|bytes| *bytes <= written[2]), "the real model's: {written:?}");
}

#[test]
fn tools_that_the_template_looks_ahead_of_are_waited_for_and_no_more() {
    let language = tiny(QWEN25, false);
    let mut kept = Kept::default();
    let mut written = Vec::new();
    for turn in 0..12 {
        kept.said.push(said("user", "what is it?"));
        let call = ToolCall { id: "1".into(), name: format!("tool{turn:02}"), arguments: "{}".into() };
        kept.said.push(Said { calls: vec![call], ..said("assistant", "") });
        kept.said.push(Said { call_id: Some("1".into()), ..said("tool", "sunny") });
        written.extend(kept.turn(&language, Some("It is."), &[], true).unwrap());
        kept.said.push(said("assistant", "It is."));
    }
    assert!(written.iter().skip(2).all(|bytes| *bytes <= written[2]), "{written:?}");
}

#[test]
fn a_front_depends_on_a_message_that_the_template_looked_ahead_at() {
    let called = vec![ToolCall { id: "1".into(), name: "weather".into(), arguments: "{}".into() }];
    let tool = |content: &str| Said { call_id: Some("1".into()), ..said("tool", content) };
    let begun = [said("user", "what is it?"), Said { calls: called, ..said("assistant", "") }, tool("sunny")];
    let with = |last: Said| begun.iter().cloned().chain([last]).collect::<Vec<_>>();
    let language = tiny(QWEN25, false);
    for last in [said("user", "really?"), tool("windy")] {
        let mut kept = Kept { said: with(last), ..Kept::default() };
        kept.turn(&language, None, &[], true).unwrap();
        assert_eq!(kept.front.as_ref().map(Front::depends_on), Some(4));
    }
    let mut plain =
        Kept { said: vec![said("user", "a"), said("assistant", "b"), said("user", "c")], ..Kept::default() };
    plain.turn(&language, None, &[], true).unwrap();
    assert_eq!(plain.front.as_ref().map(Front::depends_on), Some(2));
}

#[test]
fn a_prompt_of_no_messages_asks_for_none() {
    for language in &*LANGUAGES {
        Kept::default().turn(language, None, &[], true).unwrap();
    }
}

#[test]
fn a_message_that_a_template_drops_is_refused_after_a_front_too() {
    let language = tiny(
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}",
        false,
    );
    let mut kept = Kept { said: vec![said("user", "a"), said("assistant", "b"), said("user", "c")], ..Kept::default() };
    assert!(kept.turn(&language, None, &[], true).unwrap().is_some());
    kept.said.push(said("tool", "12"));
    let history: Arc<dyn History> = Arc::new(Conversation(kept.said.clone()));
    let refused = language.render_history(&history, kept.front.as_ref(), true, &[]);
    assert!(matches!(refused, Err(TemplateError::Dropped { .. })), "{refused:?}");
}

#[test]
fn only_a_loop_whose_text_goes_straight_to_the_prompt_is_watched() {
    let syntax = || minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap();
    for template in GROWING {
        assert!(watched(template, syntax()).is_some(), "{template}");
    }
    let kept_or_captured = [
        "{% set ns = namespace() %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all }}",
        "{% macro all() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}{{ all() }}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{{ debug() }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% macro a() %}{{ loop.index }}{% endmacro %}{{ a() }}{% endfor %}",
    ];
    for template in kept_or_captured {
        assert_eq!(watched(template, syntax()), None, "{template}");
    }
    let loops = "{%- for m in messages[1:] -%} {{ loop.index }}{% for c in loop.x %}{{ loop.first }}{% endfor %}{{ m.loop }} {%+ endfor %}";
    let expected = "{%- for (m, rekindle_round) in rekindle_rounds(rekindle_after(messages, 1)) %}{% do rekindle_round.begin()  -%} \
                    {{ rekindle_round.index }}{% for c in rekindle_round.x %}{{ loop.first }}{% endfor %}{{ m.loop }} {%+ endfor %}";
    assert_eq!(watched(loops, syntax()).unwrap().source, expected);
    let otherwise = "{% for m in messages %}{% for c in m.x %}{{ loop.index }}{% else %}{% if loop.first %}{{ loop.index }}{% endif %}{% endfor %}{{ loop.last }}{% else %}{{ loop }}{% endfor %}";
    let expected = "{% for (m, rekindle_round) in rekindle_rounds(messages) %}{% do rekindle_round.begin()  %}{% for c in m.x %}{{ loop.index }}{% else %}\
                    {% if rekindle_round.first %}{{ rekindle_round.index }}{% endif %}{% endfor %}{{ rekindle_round.last }}{% else %}{{ loop }}{% endfor %}";
    assert_eq!(watched(otherwise, syntax()).unwrap().source, expected);
}
