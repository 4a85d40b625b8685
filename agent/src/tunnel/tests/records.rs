use proptest::prelude::*;
use rustls::{AlertDescription, ContentType};

use crate::tunnel::{
    Suite,
    post_handshake::REQUESTING_KEY_UPDATE,
    records::{MAX_PLAINTEXT, MAX_RECORD, Opened, RecordError, Records},
    testing::{pair, pair_with},
};

/// Opens the one record in `wire`.
fn open(records: &mut Records, mut wire: Vec<u8>) -> Result<Opened, RecordError> {
    let (opened, length) = records.open(&mut wire)?.expect("a whole record");
    assert_eq!(length, wire.len());
    Ok(opened)
}

/// The text that arrives when `from` sends `text`, dealing with control records as a sender has to.
fn deliver(from: &mut Records, to: &mut Records, text: &[u8]) -> Vec<u8> {
    if let Some(control) = from.take_control() {
        assert_eq!(open(to, control), Ok(Opened::Control));
    }
    let mut wire = from.seal(text).unwrap();
    let Ok(Some((Opened::Data(range), length))) = to.open(&mut wire) else { panic!("no data") };
    assert_eq!(length, wire.len());
    wire[range].to_vec()
}

/// A well-formed ticket message.
fn ticket() -> Vec<u8> {
    let mut payload = vec![0, 0, 0x0e, 0x10, 1, 2, 3, 4, 1, 0, 0, 32];
    payload.extend([7; 32]);
    payload.extend([0, 0]);
    let mut message = vec![4, 0, 0, payload.len() as u8];
    message.extend(payload);
    message
}

#[test]
fn data_goes_both_ways_with_every_cipher() {
    for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305] {
        let (mut client, mut server) = pair_with(suite);
        for round in 0..300 {
            let text = format!("round {round}");
            assert_eq!(deliver(&mut client, &mut server, text.as_bytes()), text.as_bytes());
            assert_eq!(deliver(&mut server, &mut client, text.as_bytes()), text.as_bytes());
        }
        let most = vec![0xa5; MAX_PLAINTEXT];
        assert_eq!(deliver(&mut client, &mut server, &most), most);
        assert_eq!(client.seal(&vec![0; MAX_PLAINTEXT + 1]), Err(RecordError::Header));
        assert_eq!(deliver(&mut client, &mut server, b""), b"");
    }
}

#[test]
fn a_record_is_one_allocation_of_its_own_size() {
    let (mut client, _) = pair();
    let record = client.seal(&[1; 1000]).unwrap();
    assert_eq!(record.len(), 5 + 1000 + 1 + 16);
    assert_eq!(record.capacity(), record.len());
}

#[test]
fn several_records_in_one_buffer() {
    let (mut client, mut server) = pair();
    let mut wire = client.seal(b"one").unwrap();
    wire.extend(client.seal(b"two").unwrap());
    wire.extend(client.seal_close_notify().unwrap());
    let mut texts = Vec::new();
    loop {
        let (opened, length) = server.open(&mut wire).unwrap().unwrap();
        match opened {
            Opened::Data(range) => texts.push(wire[range].to_vec()),
            Opened::CloseNotify => break,
            other => panic!("{other:?}"),
        }
        wire.drain(..length);
    }
    assert_eq!(texts, [b"one".to_vec(), b"two".to_vec()]);
    let after = client.seal(b"after the end").unwrap();
    assert_eq!(open(&mut server, after), Err(RecordError::Unexpected));
    // The other direction goes on.
    assert_eq!(deliver(&mut server, &mut client, b"still here"), b"still here");
}

#[test]
fn alerts() {
    let (mut client, mut server) = pair();
    let announcement = client.seal_as(ContentType::Alert, &[1, 90]).unwrap();
    assert_eq!(open(&mut server, announcement), Ok(Opened::Control));
    let denied = client.seal_alert(AlertDescription::AccessDenied).unwrap();
    assert_eq!(open(&mut server, denied), Ok(Opened::Alert(AlertDescription::AccessDenied)));

    // The level is ignored in TLS 1.3 (RFC 8446, section 6).
    let warning = server.seal_as(ContentType::Alert, &[1, 80]).unwrap();
    assert_eq!(open(&mut client, warning), Ok(Opened::Alert(AlertDescription::InternalError)));
    for malformed in [&[][..], &[2], &[2, 49, 0], &[3, 49]] {
        let (mut client, mut server) = pair();
        let alert = client.seal_as(ContentType::Alert, malformed).unwrap();
        assert_eq!(open(&mut server, alert), Err(RecordError::Unexpected), "{malformed:?}");
    }
}

#[test]
fn incomplete_records_wait_and_impossible_headers_do_not() {
    let (mut client, mut server) = pair();
    let wire = client.seal(b"whole").unwrap();
    for cut in 0..wire.len() {
        assert_eq!(server.open(&mut wire[..cut].to_vec()), Ok(None));
    }
    assert!(matches!(open(&mut server, wire), Ok(Opened::Data(_))));

    let too_long = u16::try_from(MAX_RECORD - 5 + 1).unwrap().to_be_bytes();
    for header in [
        &[20][..],                // change_cipher_spec
        &[20, 3, 3, 0, 1, 1],     // the same, whole
        &[22],                    // plaintext handshake
        &[21, 3, 3, 0, 2, 2, 49], // plaintext alert
        &[23, 2],
        &[23, 3, 1],
        b"GET / HTTP/1.1",
        &[23, 3, 3, too_long[0], too_long[1]],
    ] {
        let (_, mut server) = pair();
        assert_eq!(server.open(&mut header.to_vec()), Err(RecordError::Header), "{header:?}");
    }
    let (_, mut server) = pair();
    for length in [0, 1, 15] {
        assert_eq!(
            server.open(&mut [vec![23, 3, 3, 0, length], vec![0; 64]].concat()),
            Err(if length == 0 { RecordError::Decrypt } else { RecordError::Unexpected })
        );
    }
}

#[test]
fn replayed_reordered_and_lost_records_are_refused() {
    let (mut client, mut server) = pair();
    let (one, two) = (client.seal(b"one").unwrap(), client.seal(b"two").unwrap());
    assert!(open(&mut server, one.clone()).is_ok());
    assert_eq!(open(&mut server, one), Err(RecordError::Decrypt));
    assert_eq!(open(&mut server, two), Err(RecordError::Unexpected), "nothing is opened after an error");

    let (mut client, mut server) = pair();
    client.seal(b"lost").unwrap();
    let late = client.seal(b"late").unwrap();
    assert_eq!(open(&mut server, late), Err(RecordError::Decrypt));
}

#[test]
fn keys_are_updated_before_the_limit_in_both_directions() {
    let (mut client, mut server) = pair();
    client.limit_for_tests(5, 8);
    server.limit_for_tests(7, 9);
    for round in 0..100_u32 {
        let text = round.to_be_bytes();
        assert_eq!(deliver(&mut client, &mut server, &text), text);
        assert_eq!(deliver(&mut server, &mut client, &text), text);
    }
    // Whoever does not ask for control records is stopped at the limit, not let past it.
    let sealed = std::iter::from_fn(|| client.seal(b"x").ok()).take(100).count();
    assert!(sealed < 8, "{sealed} records");
    assert_eq!(client.seal(b"x"), Err(RecordError::Exhausted));
    assert_eq!(client.seal_alert(AlertDescription::InternalError), Err(RecordError::Exhausted));
    assert_eq!(client.take_control(), None);
}

#[test]
fn real_limits_leave_room() {
    let (mut client, _) = pair();
    assert_eq!(client.take_control(), None);
    client.limit_for_tests(0, 1 << 24);
    assert!(client.take_control().is_some());
}

#[test]
fn a_requested_update_is_answered_once() {
    let (mut client, mut server) = pair();
    for _ in 0..2 {
        let update = client.update_tx(REQUESTING_KEY_UPDATE).unwrap();
        assert_eq!(open(&mut server, update), Ok(Opened::Control));
    }
    // Sealed before the answer: still under the old keys, which is allowed.
    assert_eq!(
        {
            let w = server.seal(b"a").unwrap();
            open(&mut client, w)
        },
        Ok(Opened::Data(5..6))
    );
    let answer = server.take_control().expect("an answer");
    assert_eq!(server.take_control(), None);
    assert_eq!(open(&mut client, answer), Ok(Opened::Control));
    assert_eq!(client.take_control(), None, "the answer asks for none");
    assert_eq!(deliver(&mut server, &mut client, b"new keys"), b"new keys");
    assert_eq!(deliver(&mut client, &mut server, b"new keys"), b"new keys");
}

#[test]
fn handshake_messages_may_share_records_and_be_split() {
    let (mut client, mut server) = pair();
    let two = [ticket(), ticket()].concat();
    let record = server.seal_as(ContentType::Handshake, &two).unwrap();
    assert_eq!(open(&mut client, record), Ok(Opened::Control));
    for part in two.chunks(7).take(12) {
        let record = server.seal_as(ContentType::Handshake, part).unwrap();
        assert_eq!(open(&mut client, record), Ok(Opened::Control));
    }
    // 12 parts of 7 bytes end within the second ticket.
    let record = server.seal_as(ContentType::Handshake, &two[84..]).unwrap();
    assert_eq!(open(&mut client, record), Ok(Opened::Control));
    assert_eq!(deliver(&mut server, &mut client, b"after"), b"after");
}

#[test]
fn handshake_messages_that_do_not_belong_here() {
    let update = [24, 0, 0, 1, 0];
    let from_server: &[&[u8]] = &[
        &[],                     // empty fragment
        &[1, 0, 0, 0],           // ClientHello
        &[13, 0, 0, 3, 0, 0, 0], // CertificateRequest
        &[20, 0, 0, 1, 0],       // Finished
        &[24, 0, 0, 0],          // KeyUpdate of no bytes
        &[24, 0, 0, 2, 0, 0],    // KeyUpdate of two bytes
        &[24, 0, 0, 1, 2],       // unknown request
        &[24, 0, 0, 1, 0, 4],    // something behind a KeyUpdate
        &[4, 1, 0xff, 0xff],     // a ticket longer than any
        &[4, 0, 0, 1, 0],        // malformed ticket
    ];
    for message in from_server {
        let (mut client, mut server) = pair();
        let record = server.seal_as(ContentType::Handshake, message).unwrap();
        assert_eq!(open(&mut client, record), Err(RecordError::Unexpected), "{message:?}");
    }
    let (mut client, mut server) = pair();
    let record = client.seal_as(ContentType::Handshake, &ticket()).unwrap();
    assert_eq!(open(&mut server, record), Err(RecordError::Unexpected), "a client sends no tickets");

    let (mut client, mut server) = pair();
    let start = client.seal_as(ContentType::Handshake, &update[..2]).unwrap();
    assert_eq!(open(&mut server, start), Ok(Opened::Control));
    let data = client.seal(b"in between").unwrap();
    assert_eq!(open(&mut server, data), Err(RecordError::Unexpected));

    let (mut client, mut server) = pair();
    let inner = client.seal_as(ContentType::ChangeCipherSpec, &[1]).unwrap();
    assert_eq!(open(&mut server, inner), Err(RecordError::Unexpected));
}

#[test]
fn a_flood_without_data_ends() {
    let (mut client, mut server) = pair();
    for _ in 0..3 {
        for _ in 0..32 {
            let empty = client.seal(b"").unwrap();
            assert!(matches!(open(&mut server, empty), Ok(Opened::Data(r)) if r.is_empty()));
        }
        assert_eq!(deliver(&mut client, &mut server, b"data"), b"data");
    }
    let mut outcome = Ok(Opened::Control);
    for _ in 0..33 {
        let update = client.update_tx(REQUESTING_KEY_UPDATE).unwrap();
        outcome = open(&mut server, update);
    }
    assert_eq!(outcome, Err(RecordError::Unexpected));
}

#[test]
fn records_go_to_the_relay_thread() {
    fn is_send<T: Send>(_: &T) {}
    let (client, server) = pair();
    is_send(&client);
    is_send(&server);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_changed_bit_is_an_error(bit in 0..(5 + 21 + 17) * 8_usize) {
        let (mut client, mut server) = pair();
        let mut wire = client.seal(b"some application data").unwrap();
        wire[bit / 8] ^= 1 << (bit % 8);
        // Enough behind it for any length the header may now announce.
        wire.resize(wire.len() + 0x1_0000, 0);
        prop_assert!(server.open(&mut wire).is_err());
    }

    #[test]
    fn foreign_bytes_never_open(bytes in proptest::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
        let (_, mut server) = pair();
        let mut wire = if framed {
            [vec![23, 3, 3, 0, bytes.len() as u8], bytes].concat()
        } else {
            bytes
        };
        prop_assert!(!matches!(server.open(&mut wire), Ok(Some(_))));
    }

    #[test]
    fn whatever_an_authenticated_peer_sends_is_survived(
        messages in proptest::collection::vec(
            (prop_oneof![Just(21_u8), Just(22), Just(23), any::<u8>()], prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..60),
                // Something like a handshake message.
                (prop_oneof![Just(4_u8), Just(24)], 0..40_u8, proptest::collection::vec(any::<u8>(), 0..40))
                    .prop_map(|(typ, length, body)| [vec![typ, 0, 0, length], body].concat()),
            ]),
            1..8,
        ),
    ) {
        let (mut client, mut server) = pair();
        for (typ, message) in messages {
            let mut wire = server.seal_as(typ.into(), &message).unwrap();
            match client.open(&mut wire) {
                Ok(Some((Opened::Data(range), length))) => {
                    prop_assert_eq!(length, wire.len());
                    prop_assert_eq!(&wire[range], &message[..]);
                }
                Ok(Some((Opened::CloseNotify | Opened::Alert(_), _))) | Err(_) => break,
                Ok(Some((Opened::Control, length))) => prop_assert_eq!(length, wire.len()),
                Ok(None) => prop_assert!(false, "a whole record was taken for a part"),
            }
        }
    }
}
