use proptest::prelude::*;

use super::*;
use crate::protocol::{ClientFrame, Request, RequestPrompt, encode_body_frame, encode_request};

/// A piece that owns its bytes; body parts of one stream in a row are joined, since how they are
/// cut is the input's business.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Frame(Header, Vec<u8>),
    Request(u32, Result<Prelude, BodyError>, u32),
    BodyHead(u32, u32),
    Body(u32, Vec<u8>),
}

fn decode_in_parts<'a>(
    side: Side,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Owned>, Option<ProtocolError>) {
    let mut decoder = Decoder::new(side, 1000);
    let mut pieces: Vec<Owned> = Vec::new();
    for mut input in parts {
        loop {
            match decoder.next(&mut input) {
                Ok(None) => break,
                Ok(Some(Piece::Frame { header, payload })) => {
                    pieces.push(Owned::Frame(header, payload.to_vec()));
                }
                Ok(Some(Piece::Request { stream, prelude, body_bytes })) => {
                    pieces.push(Owned::Request(stream, prelude, body_bytes));
                }
                Ok(Some(Piece::Body { stream, body_bytes })) => {
                    pieces.push(Owned::BodyHead(stream, body_bytes));
                }
                Ok(Some(Piece::BodyPart { stream, bytes })) => {
                    assert!(!bytes.is_empty());
                    match pieces.last_mut() {
                        Some(Owned::Body(last, all)) if *last == stream => {
                            all.extend_from_slice(bytes);
                        }
                        _ => pieces.push(Owned::Body(stream, bytes.to_vec())),
                    }
                }
                Err(error) => return (pieces, Some(error)),
            }
        }
        assert!(input.is_empty(), "all input is taken before more is asked for");
    }
    (pieces, None)
}

fn conversation() -> Vec<u8> {
    let mut bytes = Vec::new();
    ClientFrame::Ping(1).encode(&mut bytes);
    let mut request = Request::new(RequestPrompt::Text("once upon a time ".repeat(9)));
    request.tenant = crate::request::Name::new("acme").unwrap();
    request.options.ignore_eos = true;
    encode_request(&mut bytes, 1, &request, 50);
    ClientFrame::Credit { stream: 1, tokens: 3 }.encode(&mut bytes);
    encode_body_frame(&mut bytes, 9, &[]);
    encode_request(&mut bytes, 2, &request, 0);
    ClientFrame::Cancel { stream: 2 }.encode(&mut bytes);
    bytes
}

#[test]
fn a_split_at_any_byte_gives_the_same_pieces() {
    let bytes = conversation();
    let (whole, error) = decode_in_parts(Side::FromClient, [&bytes[..]]);
    assert_eq!(error, None);
    assert!(matches!(whole[0], Owned::Frame(..)));
    assert!(matches!(whole[1], Owned::Request(1, Ok(_), 50)));
    assert!(matches!(whole[2], Owned::Body(1, _)));
    for at in 0..=bytes.len() {
        let (head, tail) = bytes.split_at(at);
        assert_eq!(decode_in_parts(Side::FromClient, [head, tail]), (whole.clone(), None));
    }
    assert_eq!(decode_in_parts(Side::FromClient, bytes.chunks(1)), (whole, None));
}

#[test]
fn an_http_request_is_too_large_a_frame_at_its_first_bytes() {
    let (pieces, error) =
        decode_in_parts(Side::FromClient, [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]]);
    assert_eq!(pieces, []);
    // "GET " is a length of half a gigabyte, and "/" is no frame type.
    assert_eq!(error.unwrap().code, ErrorCode::UnknownFrame);
}

#[test]
fn a_frame_beyond_its_bound_is_refused_at_its_header() {
    for (kind, payload_bytes) in
        [(FrameType::Credit, 5), (FrameType::Body, 1001), (FrameType::Cancel, 1)]
    {
        let mut bytes = Vec::new();
        Header { payload_bytes, kind, stream: 1 }.encode(&mut bytes);
        let (_, error) = decode_in_parts(Side::FromClient, [&bytes[..]]);
        assert_eq!(error.unwrap().code, ErrorCode::FrameTooLarge);
    }
}

#[test]
fn a_request_shorter_than_its_head_is_malformed() {
    let mut bytes = Vec::new();
    Header { payload_bytes: 23, kind: FrameType::Request, stream: 1 }.encode(&mut bytes);
    let (_, error) = decode_in_parts(Side::FromClient, [&bytes[..]]);
    assert_eq!(error.unwrap().code, ErrorCode::Malformed);
    // Names longer than the frame that holds them.
    bytes.clear();
    Header { payload_bytes: 24, kind: FrameType::Request, stream: 1 }.encode(&mut bytes);
    bytes.extend_from_slice(&[2, 0, 1, 0]);
    bytes.extend_from_slice(&[0; 20]);
    let (_, error) = decode_in_parts(Side::FromClient, [&bytes[..]]);
    assert_eq!(error.unwrap().code, ErrorCode::Malformed);
}

#[test]
fn after_an_error_nothing_more_comes_out() {
    let mut decoder = Decoder::new(Side::FromClient, 1000);
    let mut input: &[u8] = &[0xff; 12];
    assert!(decoder.next(&mut input).is_err());
    let good = conversation();
    let mut input: &[u8] = &good;
    assert_eq!(decoder.next(&mut input), Ok(None));
    assert!(input.is_empty());
}

proptest! {
    #[test]
    fn any_cut_into_parts_gives_the_same_pieces(cuts in prop::collection::vec(1..60usize, 1..40)) {
        let bytes = conversation();
        let mut rest = &bytes[..];
        let mut parts = Vec::new();
        for cut in cuts {
            let (part, after) = rest.split_at(cut.min(rest.len()));
            parts.push(part);
            rest = after;
        }
        parts.push(rest);
        prop_assert_eq!(
            decode_in_parts(Side::FromClient, parts),
            decode_in_parts(Side::FromClient, [&bytes[..]])
        );
    }

    #[test]
    fn garbage_never_panics_and_splits_do_not_matter(
        garbage in prop::collection::vec(any::<u8>(), 0..400),
        at in 0..400usize,
        server in any::<bool>(),
    ) {
        let side = if server { Side::FromServer } else { Side::FromClient };
        let (head, tail) = garbage.split_at(at.min(garbage.len()));
        prop_assert_eq!(decode_in_parts(side, [head, tail]), decode_in_parts(side, [&garbage[..]]));
    }

    #[test]
    fn a_flipped_byte_gives_an_error_or_other_pieces_but_no_panic(
        at in 0..500usize,
        value in any::<u8>(),
    ) {
        let mut bytes = conversation();
        let at = at % bytes.len();
        bytes[at] = value;
        let (pieces, _) = decode_in_parts(Side::FromClient, [&bytes[..]]);
        for piece in pieces {
            if let Owned::Frame(header, payload) = piece {
                let _ = ClientFrame::decode(header, &payload);
            }
        }
    }
}
