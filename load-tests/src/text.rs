//! What do the users of a measurement say?
//!
//! Words that are one token each in the usual vocabularies, drawn from a seed: the same text for the same seed, and texts
//! of two seeds share no prefix to speak of, so that no conversation finds another's KV.

const WORDS: [&str; 32] = [
    "river", "stone", "house", "light", "green", "water", "night", "table", "small", "white", "paper", "music",
    "world", "garden", "winter", "summer", "market", "letter", "window", "street", "horse", "bread", "field", "cloud",
    "train", "school", "mother", "father", "story", "road", "blue", "wind",
];

/// `words` words, about as many tokens.
pub fn words(seed: u64, words: usize) -> String {
    // The constants of Knuth's MMIX; the high bits of such a generator are good enough for choosing words.
    let step =
        |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    let states = std::iter::successors(step(&seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)), step);
    let chosen: Vec<&str> = states.take(words).map(|state| WORDS[(state >> 59) as usize]).collect();
    chosen.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_says_the_same_and_another_says_something_else() {
        assert_eq!(words(1, 50), words(1, 50));
        assert_ne!(words(1, 4), words(2, 4));
        assert_eq!(words(3, 50).split(' ').count(), 50);
    }
}
