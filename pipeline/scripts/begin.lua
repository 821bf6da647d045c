#!lua flags=allow-oom
-- begin: may this delivery be given to its provider now? The last question before it is.
-- ARGV[1] stream  ARGV[2] group  ARGV[3] entry  ARGV[4] delivery count  ARGV[5] consumer  ARGV[6] id  ARGV[7] provider
-- ARGV[8] the least time between two messages of this provider (us; 0: none)  ARGV[9] the longest wait for one's turn (ms)
-- ARGV[10] the turn that was given before (us; '' none yet)
-- ARGV[11] 'again' where this provider knows a message by its id and may have it twice, else ''
-- Returns: time (us), word, and for some words a wait (us):
--   'begun'      it is `sending` from now on
--   'wait'       its turn comes after this wait; ask again then, with the turn, which stands behind it (us)
--   'busy'       its turn would come later than one may wait: none was given
--   'held'       the provider wants nobody for so long
--   'doubt'      somebody began and never said how it ended: it may have gone out
--   'taken'      the provider has told what became of it: it went out
--   'cancelled' | 'gone' (no such delivery is under way) | 'lost' (the entry is another's)
-- Invariant: what is begun carries its holder's mark (`doubt`) until that holder says how it ended. Of two holders of one
--   entry, one begins.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local id, provider, turn = ARGV[6], KEY.provider .. ARGV[7], tonumber(ARGV[10])
local function answer(word, ...) return {digits(now_us), word, ...} end

local owner, count = pending(ARGV[1], ARGV[2], ARGV[3])
if owner ~= ARGV[5] or count ~= tonumber(ARGV[4]) then return answer('lost') end
check_type(KEY.delivery .. id, 'hash')
check_type(KEY.events, 'stream')
check_type(provider, 'hash')
local delivery = read_delivery(id)
local live = read_live(id)
-- An entry that somebody has copied is adopted as a job of its own: it is no delivery, and nothing goes out for it.
if not delivery or not live or live.kind ~= 'delivery' or live.entry ~= ARGV[3] then return answer('gone') end
if delivery.status == 'cancelled' then return answer('cancelled') end
if RANKS[delivery.status] >= RANKS.sent then return answer('taken') end
-- Only the provider that may have it knows its id: another one would send it a second time.
local may_repeat = ARGV[11] == 'again' and delivery.provider == ARGV[7]
if delivery.doubt and not may_repeat then return answer('doubt') end

local known = call('HMGET', provider, 'held_until_ms', 'next_us')
local held_ms = tonumber(known[1] or '0') - now_ms
if held_ms > 0 then return answer('held', digits(held_ms * 1000)) end
local gap_us = tonumber(ARGV[8])
if gap_us > 0 and not turn then
  turn = math.max(now_us, tonumber(known[2] or '0'))
  if turn - now_us > tonumber(ARGV[9]) * 1000 then return answer('busy', digits(turn - now_us)) end
  call('HSET', provider, 'next_us', digits(turn + gap_us))
  if call('PTTL', provider) < (turn + gap_us - now_us) / 1000 then
    call('PEXPIRE', provider, digits(math.ceil((turn + gap_us - now_us) / 1000)))
  end
end
if turn and turn > now_us then return answer('wait', digits(turn - now_us), digits(turn)) end

delivery.provider = ARGV[7]
call('HSET', KEY.delivery .. id, 'doubt', mark_of(ARGV[3], ARGV[4]))
if not raise_delivery(id, delivery, 'sending', '', now_us) then
  call('HSET', KEY.delivery .. id, 'provider', delivery.provider)
end
return answer('begun')
