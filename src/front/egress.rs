//! What goes out on one connection: a buffer that is being sent and one that is being filled.
//!
//! Everything that a step brings to a connection's streams lands in the second buffer and leaves
//! in one send: a frame of its own would cost 60 times what it costs as part of a large send.
//! Bounds: tokens, by the streams' windows; everything else, because input stops being read while
//! [`Egress::replies_are_too_many`].

use std::collections::VecDeque;

use crate::base::SlabKey;

/// Replies (all that is not output of a stream) that may wait for a client that does not read,
/// before its own input waits too. A STATS_REPLY is up to 10 KB.
pub(super) const REPLY_BYTES_MAX: usize = 16 << 10;

/// A sent buffer this large or smaller is kept to be filled again; a larger one is freed, so that
/// a burst does not stay with an idle connection.
const KEPT_BUFFER_BYTES_MAX: usize = 16 << 10;

/// Tokens of one stream in the buffers, up to a place in the outgoing bytes.
#[derive(Clone, Copy, Debug)]
struct Mark {
    /// Bytes that were sent on this connection up to and with the last of them.
    end: u64,
    stream: SlabKey,
    tokens: u32,
}

#[derive(Debug, Default)]
pub(super) struct Egress {
    /// Being filled.
    filling: Vec<u8>,
    /// An empty buffer from an earlier send.
    spare: Vec<u8>,
    /// A send is under way.
    is_sending: bool,
    /// Bytes of `filling` that are replies.
    reply_bytes_filling: usize,
    /// Bytes of the buffer under way that are replies.
    reply_bytes_sending: usize,
    /// Bytes that were ever put into `filling`.
    put_total: u64,
    /// Bytes that the kernel ever took.
    taken_total: u64,
    /// Tokens not yet taken by the kernel, in order.
    marks: VecDeque<Mark>,
}

impl Egress {
    /// Appends replies.
    pub(super) fn reply<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let before = self.filling.len();
        let value = write(&mut self.filling);
        let bytes = self.filling.len() - before;
        self.reply_bytes_filling += bytes;
        self.put_total += bytes as u64;
        value
    }

    /// Appends output of a stream: `tokens` of them count as taken when the kernel has taken all
    /// that `write` appends.
    pub(super) fn output(
        &mut self,
        stream: SlabKey,
        tokens: u32,
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        let before = self.filling.len();
        write(&mut self.filling);
        self.put_total += (self.filling.len() - before) as u64;
        if tokens > 0 {
            self.marks.push_back(Mark { end: self.put_total, stream, tokens });
        }
    }

    pub(super) fn replies_are_too_many(&self) -> bool {
        self.reply_bytes_filling + self.reply_bytes_sending > REPLY_BYTES_MAX
    }

    pub(super) fn has_something_to_send(&self) -> bool {
        !self.filling.is_empty() && !self.is_sending
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filling.is_empty() && !self.is_sending
    }

    /// The next buffer to send; the caller sends it and reports with [`Egress::handle_sent`].
    pub(super) fn take_send(&mut self) -> Option<Vec<u8>> {
        if !self.has_something_to_send() {
            return None;
        }
        self.is_sending = true;
        self.reply_bytes_sending = std::mem::take(&mut self.reply_bytes_filling);
        Some(std::mem::replace(&mut self.filling, std::mem::take(&mut self.spare)))
    }

    /// The kernel took `taken` bytes of the buffer under way. `take` is told of every stream
    /// whose tokens left. When bytes were left they go first in the next send.
    pub(super) fn handle_sent(
        &mut self,
        mut buffer: Vec<u8>,
        taken: usize,
        mut take: impl FnMut(SlabKey, u32),
    ) {
        assert!(self.is_sending, "a send is reported that was never begun");
        assert!(taken <= buffer.len(), "more bytes taken than were sent");
        self.is_sending = false;
        self.taken_total += taken as u64;
        while let Some(mark) = self.marks.front().filter(|mark| mark.end <= self.taken_total) {
            take(mark.stream, mark.tokens);
            self.marks.pop_front();
        }
        if taken < buffer.len() {
            // Which part was replies is not known: count all of it, it goes next anyway.
            self.reply_bytes_filling += std::mem::take(&mut self.reply_bytes_sending);
            buffer.drain(..taken);
            buffer.extend_from_slice(&self.filling);
            self.filling = buffer;
            return;
        }
        self.reply_bytes_sending = 0;
        if buffer.capacity() <= KEPT_BUFFER_BYTES_MAX {
            buffer.clear();
            self.spare = buffer;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SlabKey = SlabKey { slot: 1, generation: 0 };
    const B: SlabKey = SlabKey { slot: 2, generation: 0 };

    #[test]
    fn one_send_is_under_way_and_the_next_gathers() {
        let mut egress = Egress::default();
        egress.reply(|out| out.extend_from_slice(b"one"));
        let first = egress.take_send().unwrap();
        egress.reply(|out| out.extend_from_slice(b"two"));
        egress.output(A, 1, |out| out.extend_from_slice(b"three"));
        assert_eq!(egress.take_send(), None);
        egress.handle_sent(first, 3, |_, _| panic!("no token was sent"));
        assert_eq!(egress.take_send().unwrap(), b"twothree");
    }

    #[test]
    fn tokens_are_taken_when_their_last_byte_is() {
        let mut egress = Egress::default();
        egress.output(A, 2, |out| out.extend_from_slice(b"aaaa"));
        egress.output(B, 3, |out| out.extend_from_slice(b"bbbb"));
        let buffer = egress.take_send().unwrap();
        egress.handle_sent(buffer, 3, |_, _| panic!("a byte of them is left"));
        let mut taken = Vec::new();
        let buffer = egress.take_send().unwrap();
        egress.handle_sent(buffer, 2, |stream, tokens| taken.push((stream, tokens)));
        assert_eq!(taken, [(A, 2)]);
        egress.reply(|out| out.push(b'c'));
        let buffer = egress.take_send().unwrap();
        assert_eq!(buffer, b"bbbc");
        egress.handle_sent(buffer, 4, |stream, tokens| taken.push((stream, tokens)));
        assert_eq!(taken, [(A, 2), (B, 3)]);
        assert!(egress.is_empty());
    }

    #[test]
    fn replies_that_are_not_taken_are_counted_until_they_are() {
        let mut egress = Egress::default();
        egress.reply(|out| out.resize(REPLY_BYTES_MAX, 0));
        assert!(!egress.replies_are_too_many());
        let buffer = egress.take_send().unwrap();
        egress.reply(|out| out.push(0));
        assert!(egress.replies_are_too_many());
        let bytes = buffer.len();
        egress.handle_sent(buffer, bytes, |_, _| {});
        assert!(!egress.replies_are_too_many());
        egress.output(A, 1, |out| out.resize(9 * REPLY_BYTES_MAX, 0));
        assert!(!egress.replies_are_too_many(), "output has its own bound");
    }
}
