//! What comes back, and that it is the same whatever else is going on.

use forebay::request::{FinishReason, SamplingParams};

use crate::rig::{FLAVOURS, Rig, ask, chat, collect, exactly};

#[test]
fn a_question_gets_its_answer_in_both_flavours() {
    for flavour in FLAVOURS {
        let rig = Rig::start(flavour);
        let answer = ask(&rig.connect(), chat("What is the capital of France? Answer briefly."));
        assert!(answer.text.contains("Paris"), "{:?}", answer.text);
        let done = answer.done();
        assert_eq!(done.finish, FinishReason::EndOfText);
        assert_eq!(done.usage.output_tokens as usize, answer.ids.len());
        assert!(done.usage.prompt_tokens > 10 && done.timings.ttft_ns > 0);
        assert!(done.timings.total_ns >= done.timings.ttft_ns);
        rig.wait_until_idle();
    }
}

#[test]
fn sixty_four_streams_of_mixed_lengths_each_get_exactly_what_they_asked_for() {
    for flavour in FLAVOURS {
        let rig = Rig::start(flavour);
        let clients: Vec<_> = (0..4).map(|_| rig.connect()).collect();
        let lengths = |stream: u32| 1 + (stream * 7) % 40;
        let generations: Vec<_> = (0..64u32)
            .map(|stream| {
                let text = "The river rose in the night. ".repeat(1 + stream as usize % 9);
                let request = exactly(&text, lengths(stream));
                (stream, clients[stream as usize % 4].request(request).unwrap())
            })
            .collect();
        for (stream, generation) in generations {
            let answer = collect(generation);
            assert_eq!(answer.ids.len() as u32, lengths(stream), "stream {stream}");
            assert_eq!(answer.done().finish, FinishReason::MaxTokens);
        }
        rig.wait_until_idle();
    }
}

#[test]
fn a_text_is_the_same_alone_and_among_31_others() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let story = || {
        let mut request = exactly("Once upon a time there was a miller who", 48);
        request.options.sampling =
            SamplingParams { temperature: 0.9, top_p: 0.95, seed: 7, ..SamplingParams::default() };
        request
    };
    let alone = ask(&client, story());
    let others = |count: u32| -> Vec<_> {
        (0..count)
            .map(|other| {
                let text = "Rain fell on the hills and ".repeat(1 + other as usize % 30);
                client.request(exactly(&text, 10 + other * 3)).unwrap()
            })
            .collect()
    };
    let (before, among, after) = (others(16), client.request(story()).unwrap(), others(15));
    let among = collect(among);
    assert_eq!(alone.ids, among.ids, "\n{:?}\n{:?}", alone.text, among.text);
    assert_eq!(alone.text, among.text);
    for other in before.into_iter().chain(after) {
        collect(other).done();
    }
}

#[test]
fn a_seed_decides_the_draws_and_another_seed_draws_otherwise() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let drawn = |seed| {
        let mut request = exactly("My favourite word is", 24);
        request.options.sampling = SamplingParams { seed, ..SamplingParams::default() };
        ask(&client, request).ids
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let whole = ask(&client, exactly("One, two, three, four,", 24)).text;
    let stop: String = whole.chars().skip(whole.chars().count() / 2).take(4).collect();
    let mut request = exactly("One, two, three, four,", 24);
    request.options.stop = vec![stop.as_bytes().into()];
    let answer = ask(&client, request);
    assert_eq!(answer.done().finish, FinishReason::StopString);
    assert_eq!(answer.text, whole[..whole.find(&stop).unwrap()]);
}

#[test]
fn log_probabilities_come_with_the_tokens_and_the_greedy_choice_is_the_likeliest() {
    use forebay::client::Event;
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let mut request = exactly("The sky is", 8);
    request.options.sampling.logprobs = Some(3);
    let mut seen = 0;
    for event in client.request(request).unwrap() {
        let Event::Tokens(tokens) = event.unwrap() else { continue };
        assert_eq!(tokens.ids.len(), tokens.logprobs.len());
        for (id, entry) in tokens.ids.iter().zip(&tokens.logprobs) {
            assert_eq!(entry.top.len(), 3);
            assert_eq!(entry.top[0].0, *id);
            assert_eq!(entry.top[0].1, entry.logprob);
            assert!(entry.logprob <= 0.0 && entry.top[1].1 <= entry.top[0].1);
            seen += 1;
        }
    }
    assert_eq!(seen, 8);
}

#[test]
fn a_control_token_spelled_out_by_a_user_is_text() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let spelled = ask(&client, chat("Say <|im_end|> please")).done().usage.prompt_tokens;
    let without = ask(&client, chat("Say please")).done().usage.prompt_tokens;
    // As one control token it would add 1 or 2.
    assert!(spelled >= without + 5, "{spelled} and {without} tokens");
}
