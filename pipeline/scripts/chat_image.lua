#!lua flags=allow-oom
-- chat_image: an image that follows a reply is made: keep it, and tell those who watch.
-- ARGV[1] chat (as it stands in keys)  ARGV[2] epoch of the reply  ARGV[3] image id, which is the reply's message id
-- ARGV[4] the image  ARGV[5] its type  ARGV[6] how long it is kept (ms)  then the ids of the messages that the reply answers
-- Returns: time (us), 'kept' | 'already' | 'lost' (the chat has begun anew since, or is gone).
-- Invariant: an image is told once, and never to a conversation that it is no part of.
local now_us = clock_us()
local key, id = ARGV[1], ARGV[3]
local image = KEY.chat_image .. key .. ':' .. id
check_chat(key)
check_type(image, 'hash')
local chat = read_chat(key)
if call('EXISTS', image) == 1 then return {digits(now_us), 'already'} end
if not chat or chat.epoch ~= ARGV[2] then return {digits(now_us), 'lost'} end
call('HSET', image, 'data', ARGV[4], 'type', ARGV[5])
call('PEXPIRE', image, ARGV[6])
local ids = {}
for i = 7, #ARGV do ids[#ids + 1] = '"' .. ARGV[i] .. '"' end
local more = '"message_ids":[' .. table.concat(ids, ',') .. '],"message_id":"' .. id .. '","image_id":"' .. id .. '","content_type":"' .. ARGV[5] .. '"'
tell_chat(key, chat, 'image', more, now_us)
return {digits(now_us), 'kept'}
