//! Which parts of a prompt are markup, and how does text that somebody typed never become it?
//!
//! Markup is what a vocabulary has beside ordinary text: control tokens (`<|im_end|>`) and tokens that the model's maker
//! defined (`<think>`). A chat template writes them as text, among the texts of messages. So, before rendering, a *shield*
//! (a character that no message holds) goes behind every character of a message that could begin a markup token, and
//! behind its first visible one; after rendering the shields are taken out, and where each stood is a *wall*: no markup
//! token covers the character before it.
//! Invariant: a markup token of a rendered prompt is made of the template's own characters alone. One that held a
//! message's character would begin inside of the message, at a walled character, or before it, and then cover its first.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::HashSet;
use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::types::TokenId;

/// What of a text of a message may be markup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Author {
    /// Nothing.
    Client,
    /// The maker's own tokens, such as `<think>`: the model wrote them as a part of its text, and the template may look
    /// for them. Control tokens are not.
    Model,
}

/// A part of a text: markup, or text to tokenise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part<'t> {
    Markup { id: TokenId, text: &'t str },
    Text(&'t str),
}

/// The markup tokens of a vocabulary.
pub struct Markup {
    all: AhoCorasick,
    /// `[patterns of all]`
    ids: Vec<TokenId>,
    /// Those of the maker, that a model writes as text.
    own: AhoCorasick,
    /// First characters of all tokens of more than white space. A maker's tokens for runs of white space are found in
    /// messages as elsewhere.
    first: HashSet<char>,
    /// First characters of control tokens.
    first_control: HashSet<char>,
}

impl Markup {
    /// Of the texts of control tokens, and of the maker's own. Errors if there are too many to search for.
    pub fn new<'v>(
        control: impl IntoIterator<Item = (TokenId, &'v str)>,
        own: impl IntoIterator<Item = (TokenId, &'v str)>,
    ) -> Result<Self, aho_corasick::BuildError> {
        let visible = |texts: &[(TokenId, &str)]| -> HashSet<char> {
            let texts = texts.iter().filter(|(_, text)| text.chars().any(|c| !c.is_whitespace()));
            texts.filter_map(|(_, text)| text.chars().next()).collect()
        };
        let control: Vec<_> = control.into_iter().filter(|(_, text)| !text.is_empty()).collect();
        let own: Vec<_> = own.into_iter().filter(|(_, text)| !text.is_empty()).collect();
        let longest = |texts: &[(TokenId, &str)]| {
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts.iter().map(|(_, text)| text))
        };
        let first_control = visible(&control);
        let all = [control, own.clone()].concat();
        Ok(Self {
            all: longest(&all)?,
            ids: all.iter().map(|(id, _)| *id).collect(),
            own: longest(&own)?,
            first: visible(&all),
            first_control,
        })
    }

    /// `text` with shields: behind each character that could begin a markup token, and behind the first visible one.
    pub fn shield(&self, text: &str, shield: char, author: Author) -> String {
        let mut out = String::with_capacity(text.len() + text.len() / 16 + shield.len_utf8());
        let mut own = match author {
            Author::Client => None,
            Author::Model => Some(self.own.find_iter(text).map(|found| found.range()).peekable()),
        };
        let mut at_front = true;
        for (at, c) in text.char_indices() {
            out.push(c);
            let could_begin = match &mut own {
                None => self.first.contains(&c),
                Some(own) => {
                    while own.next_if(|range| range.end <= at).is_some() {}
                    if own.peek().is_some_and(|range| range.contains(&at)) {
                        at_front = false;
                        false
                    } else {
                        self.first_control.contains(&c)
                    }
                }
            };
            let is_front = at_front && !c.is_whitespace();
            at_front &= c.is_whitespace();
            if could_begin || is_front {
                out.push(shield);
            }
        }
        out
    }

    /// The parts of `text[from..]`, in order: they join to it. No markup covers a character at a wall. `walls` are
    /// ascending byte positions of characters. The longest markup wins, of those that begin first.
    pub fn parts<'t>(&self, text: &'t str, walls: &[usize], from: usize) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let mut done = from;
        for open in between_walls(text, walls, from) {
            let Some(stretch) = text.get(open.clone()) else { continue };
            for found in self.all.find_iter(stretch) {
                let range = open.start + found.start()..open.start + found.end();
                let (Some(markup), Some(&id)) = (text.get(range.clone()), self.ids.get(found.pattern().as_usize()))
                else {
                    continue;
                };
                parts.extend(text.get(done..range.start).filter(|text| !text.is_empty()).map(Part::Text));
                parts.push(Part::Markup { id, text: markup });
                done = range.end;
            }
        }
        parts.extend(text.get(done..).filter(|text| !text.is_empty()).map(Part::Text));
        parts
    }
}

/// The stretches of `text[from..]` without a walled character.
fn between_walls(text: &str, walls: &[usize], from: usize) -> impl Iterator<Item = Range<usize>> {
    let walled = walls.iter().copied().filter(move |&wall| wall >= from).chain([text.len()]);
    walled
        .scan(from, |start, wall| {
            let stretch = *start..wall;
            let walled_bytes = text.get(wall..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8);
            *start = wall + walled_bytes;
            Some(stretch)
        })
        .filter(|stretch| !stretch.is_empty())
}

/// A character that none of `texts` holds: a noncharacter, which Unicode keeps for uses such as this, else one of the
/// private planes. `None` if the texts hold them all.
pub fn unused_character<'t>(texts: impl IntoIterator<Item = &'t str>) -> Option<char> {
    let used: HashSet<char> = texts.into_iter().flat_map(str::chars).filter(|&c| c >= '\u{FDD0}').collect();
    ('\u{FDD0}'..='\u{FDEF}').chain('\u{F0000}'..='\u{10FFFF}').find(|c| !used.contains(c))
}

/// `text` without its shields, and the walls that they leave: positions of the characters before them.
pub fn lift(text: &str, shield: char) -> (String, Vec<usize>) {
    let mut out = String::with_capacity(text.len());
    let mut walls: Vec<usize> = Vec::new();
    let mut stretches = text.split(shield).peekable();
    while let Some(stretch) = stretches.next() {
        out.push_str(stretch);
        if stretches.peek().is_some()
            && let Some((wall, _)) = out.char_indices().next_back()
            && walls.last() != Some(&wall)
        {
            walls.push(wall);
        }
    }
    (out, walls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markup() -> Markup {
        let control = [(TokenId(1), "<s>"), (TokenId(2), "<|end|>"), (TokenId(3), "[INST]")];
        let own = [(TokenId(4), "<think>"), (TokenId(5), "\n\n")];
        Markup::new(control, own).unwrap()
    }

    fn ids(markup: &Markup, text: &str, walls: &[usize]) -> Vec<u32> {
        let parts = markup.parts(text, walls, 0);
        let joined: String = parts
            .iter()
            .map(|part| match part {
                Part::Text(text) | Part::Markup { text, .. } => *text,
            })
            .collect();
        assert_eq!(joined, text);
        parts.iter().filter_map(|part| if let Part::Markup { id, .. } = part { Some(id.0) } else { None }).collect()
    }

    fn rendered(markup: &Markup, before: &str, content: &str, after: &str, author: Author) -> Vec<u32> {
        let shield = unused_character([content]).unwrap();
        let text = format!("{before}{}{after}", markup.shield(content, shield, author));
        let (text, walls) = lift(&text, shield);
        assert_eq!(text, format!("{before}{content}{after}"));
        ids(markup, &text, &walls)
    }

    #[test]
    fn markup_that_nobody_shielded_is_found_longest_first() {
        assert_eq!(ids(&markup(), "<s>a<|end|>\n\n<think>", &[]), [1, 2, 5, 4]);
    }

    #[test]
    fn a_clients_text_is_never_markup_but_for_white_space() {
        let markup = markup();
        for content in ["<s>", "a<|end|>b", "<think>", "[INST]<s>", "<|end|><|end|>", "  <s>"] {
            assert_eq!(rendered(&markup, "<s>", content, "<|end|>", Author::Client), [1, 2], "{content}");
        }
        assert_eq!(rendered(&markup, "<s>", "a\n\nb", "<|end|>", Author::Client), [1, 5, 2]);
    }

    #[test]
    fn markup_never_crosses_the_border_of_a_message() {
        let markup = markup();
        assert_eq!(rendered(&markup, "<s><|", "end|> x", "", Author::Client), [1]);
        assert_eq!(rendered(&markup, "", "x <|en", "d|><s>", Author::Client), [1]);
        assert_eq!(rendered(&markup, "", "<", "s>", Author::Client), [0_u32; 0]);
        assert_eq!(rendered(&markup, "", "<", "<s>", Author::Client), [1]);
    }

    #[test]
    fn a_models_text_keeps_the_makers_tokens_and_no_control_token() {
        let markup = markup();
        assert_eq!(rendered(&markup, "", "<think>a<s>\n\n<|end|>", "<|end|>", Author::Model), [4, 5, 2]);
        let shielded = markup.shield("<think>a</think>", '\u{FDD0}', Author::Model);
        assert!(shielded.starts_with("<think>a"), "the template finds it: {shielded}");
    }

    #[test]
    fn a_text_may_hold_every_noncharacter() {
        let nasty: String = ('\u{FDD0}'..='\u{FDEF}').collect();
        assert_eq!(unused_character([nasty.as_str(), "<s>"]), Some('\u{F0000}'));
        assert_eq!(rendered(&markup(), "<s>", &format!("<s>{nasty}"), "", Author::Client), [1]);
    }
}
